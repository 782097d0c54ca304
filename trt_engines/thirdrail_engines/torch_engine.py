# SPDX-License-Identifier: Apache-2.0
"""The engine on PyTorch itself: runs a torch.export program, operator by operator, or a package
that AOTInductor has compiled from one (torch_package.py).

It serves what cannot be written as ONNX, and runs on any GPU that PyTorch knows. Importing this
module imports torch, some hundred MB: a worker does so only for a model that is served by it.

Inputs are read where they lie, and may lie in read-only memory; programs that write to their inputs
or buffers are refused when they are loaded. Results lie where their operators put them. What has to
be copied all the same, because it lies on the device or is somebody else's memory, is copied to the
array of `into` directly.

On CUDA this was not yet run on a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from thirdrail import dtypes
from thirdrail.dtypes import DType
from thirdrail.tensors import Array, TensorSpec
from thirdrail_engines.engine import (
    DeviceLost,
    EngineError,
    EngineInputError,
    EngineMemoryError,
    EngineSpec,
    ModelFileError,
)
from thirdrail_engines.malloc import return_free_memory
from thirdrail_engines.options import EngineOptions
from thirdrail_engines.plans import BuildError
from thirdrail_engines.torch_sources.exported import (
    DTYPES,
    Exported,
    changes_itself,
    load_exported,
)
from thirdrail_engines.torch_sources.reading import refusal, tidy
from thirdrail_engines.torch_sources.sizes import sizes_of

_PLATFORM = "pytorch_exported"

_RUN_S_MAX = 60.0  # on a device; see EngineSpec

_BF16, _BOOL = dtypes.BY_NAME["BF16"], dtypes.BOOL


def load_torch(
    path: Path, *, options: EngineOptions, device: str = "cpu", is_within_bounds: bool = False
) -> "TorchEngine":
    """Load a `.pt2` file, onto the CPU or a CUDA device ("cuda", "cuda:1").

    is_within_bounds: take no other sizes than its open dimensions were exported for, as compiled
        code does; by themselves, programs take one row where they were exported for two and more.
    Raises ModelFileError when the file cannot be read or served, or the device is not there.
    """
    if path.suffix == ".pt":
        raise refusal(
            path,
            "a TorchScript file does not say what it takes, so it is compiled and not run by "
            "PyTorch: save the model with torch.export.save as model.pt2",
        )
    if device != "cpu" and not torch.cuda.is_available():
        raise ModelFileError(f"{path.name}: this PyTorch sees no CUDA device")
    exported = load_exported(path)
    if exported.changed:
        raise refusal(path, changes_itself(exported.changed))
    program = exported.program
    try:
        if device != "cpu":
            program = torch.export.passes.move_to_device_pass(program, device)
        module = program.module()
    except Exception as error:  # its parts raise whatever they happen to
        raise refusal(path, f"PyTorch cannot load it: {tidy(error)}") from None
    return_free_memory()
    program_of = _eager(module, exported)
    if is_within_bounds:
        with suppress(BuildError):  # that compiled code cannot hold to what it demands
            program_of = replace(program_of, check=sizes_of(path, exported).check)
    return TorchEngine(program_of, options, torch.device(device))


@dataclass(frozen=True, slots=True)
class Program:
    """What the engine runs. outputs: with the place of each among all that `call` returns.

    call: from tensors on the device, by name, to all that is returned, results and others.
    constants: the addresses of memory that is the program's own, and may be returned.
    check: raises EngineError for shapes that it does not take, of inputs by name; called before
        any run.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[tuple[int, TensorSpec], ...]
    call: Callable[[Mapping[str, Any]], Sequence[Any]]
    constants: frozenset[int] = frozenset()
    check: Callable[[Mapping[str, Sequence[int]]], None] = lambda _: None


def _eager(module: Any, exported: Exported) -> Program:
    arguments = _arguments(exported.program, [spec.name for spec in exported.inputs])
    own = (*module.parameters(), *module.buffers(), *exported.program.constants.values())

    def call(tensors: Mapping[str, Any]) -> Sequence[Any]:
        positional, named = arguments(tensors)
        returned = module(*positional, **named)
        leaves: list[Any] = pytree.tree_leaves(returned, is_leaf=lambda leaf: leaf is None)
        return leaves

    return Program(exported.inputs, exported.outputs, call, frozenset(_storages(own)))


class TorchEngine:
    """See Engine. Build it with `load_torch` or `load_package`."""

    def __init__(self, program: Program, options: EngineOptions, device: Any) -> None:
        self._call: Any = program.call
        self._check_shapes = program.check
        self._device = device
        self._threads = options.threads_max
        self._inputs = {spec.name: spec for spec in program.inputs}
        self._outputs = {spec.name: (place, spec) for place, spec in program.outputs}
        self._constants = program.constants
        self._spec = EngineSpec(
            program.inputs,
            tuple(spec for _, spec in program.outputs),
            _PLATFORM,
            # Nothing was found out about how its operators read: every input is copied first.
            positional_inputs=frozenset(),
            overlapped_runs=int(device.type != "cpu"),
            run_s_max=_RUN_S_MAX if device.type != "cpu" else 0.0,
        )

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    def run(
        self,
        inputs: Mapping[str, Array],
        wanted: Sequence[str],
        into: Mapping[str, Array],
    ) -> dict[str, Array]:
        """See Engine.run. All outputs are computed, whichever are wanted."""
        self._check_names(inputs, wanted)
        for name, array in inputs.items():
            self._check_input(name, array)
        self._check_shapes({name: array.shape for name, array in inputs.items()})
        for name, array in into.items():
            self._check_target(name, array)
        if not wanted:
            return {}
        # PyTorch keeps the number for each thread, and starts threads with all cores.
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        try:
            tensors = {name: self._tensor(name, array) for name, array in inputs.items()}
            with torch.inference_mode():
                returned = self._call(tensors)
                foreign = self._constants.union(_storages(tensors.values()))
                return {name: self._fetch(name, returned, foreign, into) for name in wanted}
        except EngineError:
            raise
        except Exception as error:  # an operator raises whatever it happens to
            self._raise_if_lost()
            raise _failure(error) from None

    def close(self) -> None:
        """See Engine.close. Results that were handed out stay valid."""
        self._call = None
        return_free_memory()

    def _raise_if_lost(self) -> None:
        """A sticky error of a device answers every later call as well."""
        if self._device.type == "cpu":
            return
        try:
            torch.cuda.synchronize(self._device)
        except Exception as error:
            raise DeviceLost(f"the device was lost: {tidy(error)}") from None

    def _check_input(self, name: str, array: Array) -> None:
        spec = self._inputs.get(name)
        if spec is None:
            raise EngineError(f"'{name}' is no input, expected {', '.join(self._inputs)}")
        if array.dtype != spec.dtype.numpy or not _fits(array.shape, spec.shape):
            raise EngineError(
                f"input '{name}' is {array.dtype} with the shape {list(array.shape)}, expected "
                f"{spec.dtype.name} with {list(spec.shape)}"
            )

    def _tensor(self, name: str, array: Array) -> Any:
        """The array as a tensor on the device: on the CPU, its own memory."""
        spec = self._inputs[name]
        if spec.dtype is _BOOL:
            array = array.view(np.uint8) != 0  # a byte of 255 is no boolean to every kernel
        tensor = _tensor_of(array, spec.dtype)
        return tensor if self._device.type == "cpu" else tensor.to(self._device)

    def _check_names(self, inputs: Mapping[str, Array], wanted: Sequence[str]) -> None:
        absent = self._inputs.keys() - inputs.keys()
        if absent:
            raise EngineError(f"input '{min(absent)}' is absent")
        unknown = [name for name in wanted if name not in self._outputs]
        if unknown:
            raise EngineError(f"'{unknown[0]}' is no output, expected {', '.join(self._outputs)}")

    def _check_target(self, name: str, array: Array) -> None:
        place_and_spec = self._outputs.get(name)
        if place_and_spec is None:
            raise EngineError(f"'{name}' is no output, expected {', '.join(self._outputs)}")
        dtype = place_and_spec[1].dtype
        if array.dtype != dtype.numpy or not array.flags.carray:
            raise EngineError(
                f"output '{name}' needs a writable, contiguous array of {dtype.name}, "
                f"got {array.dtype}"
            )

    def _fetch(
        self, name: str, returned: Sequence[Any], foreign: frozenset[int], into: Mapping[str, Array]
    ) -> Array:
        """One result as an array that is nobody else's memory."""
        place, spec = self._outputs[name]
        tensor, target = returned[place], into.get(name)
        if target is not None and tuple(tensor.shape) != target.shape:
            raise EngineError(
                f"output '{name}' has the shape {list(tensor.shape)}, "
                f"the array to write it to has {list(target.shape)}"
            )
        if DTYPES.get(tensor.dtype) is not spec.dtype:
            raise EngineError(f"output '{name}' is a {tensor.dtype}, not {spec.dtype.name}")
        is_foreign = tensor.untyped_storage().data_ptr() in foreign
        is_copied = is_foreign or tensor.device.type != "cpu" or not tensor.is_contiguous()
        if is_copied and target is not None:
            _tensor_of(target, spec.dtype).copy_(tensor)
            return target
        return _array_of((tensor.clone() if is_foreign else tensor).cpu().contiguous(), spec)


def _arguments(
    program: Any, names: Sequence[str]
) -> Callable[[Mapping[str, Any]], tuple[Sequence[Any], Mapping[str, Any]]]:
    """How named tensors become what the program is called with: nested as it was exported, with
    the constants among its arguments."""
    tree = program.call_spec.in_spec
    specs = program.graph_signature.input_specs
    taken = [spec.arg for spec in specs if spec.kind.name == "USER_INPUT"]
    constants = [getattr(argument, "value", None) for argument in taken]
    places = [place for place, argument in enumerate(taken) if not hasattr(argument, "value")]

    def arrange(tensors: Mapping[str, Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        leaves = list(constants)
        for place, name in zip(places, names, strict=True):
            leaves[place] = tensors[name]
        positional, named = pytree.tree_unflatten(leaves, tree)
        return positional, named

    return arrange


def _storages(tensors: Any) -> list[int]:
    return [t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)]


def _fits(shape: Sequence[int], spec: Sequence[int]) -> bool:
    return len(shape) == len(spec) and all(
        wanted in (-1, found) for found, wanted in zip(shape, spec, strict=True)
    )


class _Writable:
    """An array's memory, said to be writable: torch has no tensors that are not, and warns."""

    def __init__(self, array: Array) -> None:
        self._array = array  # lives as long as what looks at its memory
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def _tensor_of(array: Array, dtype: DType) -> Any:
    """The same memory as a tensor. Inputs are never written to: see the programs that are
    refused."""
    if dtype is _BF16:  # torch knows numpy's own types only
        array = array.view(np.uint16)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype is _BF16 else tensor


def _array_of(tensor: Any, spec: TensorSpec) -> Array:
    if spec.dtype is _BF16:
        assert _BF16.numpy is not None
        array: Array = tensor.view(torch.uint16).numpy().view(_BF16.numpy)
        return array
    plain: Array = tensor.numpy()
    return plain


def _failure(error: Exception) -> EngineError:
    """A guard of the program says which of its assumptions is broken, in Python's words.

    What an operator refuses is the inputs' fault: the program is the same in every run. Subclasses
    of RuntimeError, and the libraries of CUDA, speak of the device.
    """
    text = tidy(error)
    if isinstance(error, AssertionError) and text.startswith("Guard failed: "):
        needs = text.removeprefix("Guard failed: ")
        return EngineInputError(f"the model takes no such shape: it needs {needs}")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return EngineMemoryError(f"no memory for a run: {text}")
    if type(error) in (IndexError, RuntimeError) and "CUDA" not in text:
        return EngineInputError(f"the model cannot compute with these inputs: {text}")
    return EngineError(text)
