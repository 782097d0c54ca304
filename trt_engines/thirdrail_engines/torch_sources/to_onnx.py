# SPDX-License-Identifier: Apache-2.0
"""From PyTorch's formats to ONNX. Runs in the build process only: reading such a file runs code."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.plans import BuildError, BuildFault, Profile, TellProgress
from thirdrail_engines.torch_sources.archive import EXPORT_ADVICE, Kind, kind_of

# What both of torch's exporters write and every builder reads.
OPSET = 20

_PHASE = "torch to ONNX"
_STEPS = 4


def to_onnx(path: Path, folder: Path, tell: TellProgress, profiles: Sequence[Profile] = ()) -> Path:
    """Write the model of a `.pt2` or `.pt` file as ONNX into `folder`; returns the ONNX file.

    Inputs keep the names of the model's arguments. Outputs have the keys or field names that the
    model returns them under, or are "output" or "output_0", "output_1", ... An open dimension is
    named after the first tensor that has it, as "words_dim0"; dimensions that must be equal have
    one name.

    profiles: TorchScript files do not say what they take, so the first profile must.
    Raises BuildError, and OSError when the file cannot be written.
    """
    tell(_PHASE, 0, _STEPS)
    kind = kind_of(path)
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it and imports it late
        import torch  # noqa: F401
    except ImportError as error:
        raise BuildError(
            BuildFault.MISSING,
            f"{path.name} needs {error.name}, which is not installed: "
            "pip install 'thirdrail[torch]'",
        ) from None
    target = folder / f"{path.stem}.onnx"
    if kind is Kind.TORCHSCRIPT and path.suffix == ".pt2":
        raise BuildError(BuildFault.REFUSED, f"{path.name}: a TorchScript file: name it model.pt")
    if kind is Kind.EXPORTED:
        _convert_exported(path, target, tell)
    else:
        _convert_script(path, target, profiles, tell)
    tell(_PHASE, _STEPS, _STEPS)
    return target


def _convert_exported(path: Path, target: Path, tell: TellProgress) -> None:
    import torch

    from thirdrail_engines.torch_sources.agreement import disagreement
    from thirdrail_engines.torch_sources.exported import changes_itself, load_exported
    from thirdrail_engines.torch_sources.quiet import quiet_exporter
    from thirdrail_engines.torch_sources.reading import refusal, tidy

    exported = load_exported(path)
    if exported.changed:
        raise refusal(path, changes_itself(exported.changed))
    if exported.constants:
        place, words = exported.constants[0]
        raise refusal(path, f"output {place} is {words} and no tensor, return tensors only")
    tell(_PHASE, 1, _STEPS)
    try:
        with quiet_exporter():
            made = torch.onnx.export(
                exported.program,
                input_names=[spec.name for spec in exported.inputs],
                output_names=[spec.name for _, spec in exported.outputs],
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            _name_dimensions(made.model)
            tell(_PHASE, 2, _STEPS)
            made.save(target)
        tell(_PHASE, 3, _STEPS)
        fault = disagreement(exported, target)
    except OSError:  # of writing
        raise
    except ModelFileError as error:
        raise refusal(path, f"ONNX Runtime cannot run its ONNX form: {error}") from None
    except Exception as error:  # its parts raise whatever they happen to
        raise refusal(path, f"PyTorch cannot write it as ONNX: {tidy(error)}") from None
    if fault:
        raise refusal(
            path,
            f"its ONNX form and PyTorch do not agree on the example inputs in it: {fault}. Was "
            "model.eval() called before it was exported?",
        )


def _name_dimensions(model: Any) -> None:
    """Give open dimensions names that depend on the model only. `model`: an onnx_ir.Model.

    torch calls them s31 or u0, after hashes and counters.
    """
    names: dict[str, str] = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None and dim.value.isidentifier():
                names.setdefault(dim.value, f"{value.name}_dim{axis}")
    for value in _values(model):
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[axis] = re.sub(
                    r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), dim.value
                )


def _values(model: Any) -> Iterable[Any]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _convert_script(
    path: Path, target: Path, profiles: Sequence[Profile], tell: TellProgress
) -> None:
    import torch

    from thirdrail_engines.torch_sources.quiet import quiet_exporter
    from thirdrail_engines.torch_sources.reading import refusal, tidy

    with quiet_exporter():
        try:
            script = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:  # its parts raise whatever they happen to
            raise refusal(path, f"PyTorch cannot read it: {tidy(error)}") from None
        names = _script_inputs(path, script)
        shapes = _script_shapes(path, names, profiles)
        tell(_PHASE, 1, _STEPS)
        try:
            examples = tuple(torch.rand(shapes[name]) for name in names)
            returned = script(*examples)
            outputs = _script_outputs(path, returned, names)
            torch.onnx.export(
                script,
                examples,
                target,
                input_names=names,
                output_names=outputs,
                dynamic_axes=_script_axes(names, profiles[0]),
                opset_version=OPSET,
                dynamo=False,
            )
        except BuildError:
            raise
        except Exception as error:  # its parts raise whatever they happen to
            raise refusal(
                path,
                f"PyTorch {torch.__version__} cannot write this TorchScript file as ONNX: "
                f"{tidy(error)}. Its inputs were taken to be FP32, of the profile's shapes. "
                f"Better: {EXPORT_ADVICE}",
            ) from None


def _script_inputs(path: Path, script: Any) -> list[str]:
    arguments = script.forward.schema.arguments[1:]
    for each in arguments:
        if str(each.type) != "Tensor":
            raise BuildError(
                BuildFault.REFUSED,
                f"{path.name}: input '{each.name}' is of the type {each.type}, expected tensors "
                f"only: {EXPORT_ADVICE}",
            )
    return [each.name for each in arguments]


def _script_shapes(
    path: Path, names: Sequence[str], profiles: Sequence[Profile]
) -> Mapping[str, tuple[int, ...]]:
    given = profiles[0].inputs if profiles else {}
    absent = [name for name in names if name not in given]
    if absent:
        line = (
            f'parameters {{ key: "profile.0.{absent[0]}" value {{ string_value: "1x3,4x3,8x3" }} }}'
        )
        raise BuildError(
            BuildFault.REFUSED,
            f"{path.name}: a TorchScript file does not say which shapes it takes. Write the "
            f"smallest, best and largest of input '{absent[0]}' into the config, as {line}, or "
            f"better: {EXPORT_ADVICE}",
        )
    return {name: given[name].best for name in names}


def _script_outputs(path: Path, returned: Any, taken: Sequence[str]) -> list[str]:
    import torch

    if isinstance(returned, torch.Tensor):
        return ["output"]
    if isinstance(returned, tuple) and all(isinstance(each, torch.Tensor) for each in returned):
        fields = getattr(returned, "_fields", [f"output_{i}" for i in range(len(returned))])
        return [f"{name}_out" if name in taken else name for name in fields]
    raise BuildError(
        BuildFault.REFUSED,
        f"{path.name}: it returns a {type(returned).__name__}, expected a tensor or a tuple of "
        f"tensors: return one of these, or {EXPORT_ADVICE}",
    )


def _script_axes(names: Sequence[str], profile: Profile) -> dict[str, dict[int, str]]:
    """Open are the dimensions that the profile leaves open."""
    axes: dict[str, dict[int, str]] = {}
    for name in names:
        each = profile.inputs[name]
        for axis, (low, high) in enumerate(zip(each.smallest, each.largest, strict=True)):
            if low != high:
                axes.setdefault(name, {})[axis] = f"{name}_dim{axis}"
    return axes
