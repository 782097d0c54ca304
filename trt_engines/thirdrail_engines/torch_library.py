# SPDX-License-Identifier: Apache-2.0
"""A library that AOTInductor made, called as C: so other threads go on while it runs.

PyTorch's own bindings keep Python's lock for the length of a run (seen with 2.13, and known there
as issue 197516), which would stop the whole process. ctypes lets go of it. The functions are those
of torch/csrc/inductor/aoti_runtime/interface.h; tensors cross over by the conversions that PyTorch
has for its own generated code.

What is not there without PyTorch's bindings: operators that the library itself cannot reach. A run
that needs one ends with an error.

On CUDA this was not yet run on a GPU.
"""

import _ctypes
import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_Handle = ctypes.c_void_p

_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype, _pointer_of.argtypes = _Handle, (ctypes.py_object, ctypes.c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype = ctypes.py_object
_capsule_of.argtypes = (_Handle, ctypes.c_char_p, ctypes.c_void_p)


class LibraryError(Exception):
    """What the library said of a call that failed."""


class TorchLibrary:
    """runs_at_once: others wait. device: "cpu", "cuda" or "cuda:1".

    Unloaded when nobody has it any more, and its weights with it; results outlive it. That the
    linker can do so is the builder's work (builders/cpp_compiler.py).
    Raises OSError where the linker refuses it, LibraryError where it cannot set itself up.
    """

    def __init__(self, path: Path, runs_at_once: int, device: str) -> None:
        self._library = library = ctypes.CDLL(str(path))
        self._container = container = _Handle()
        try:
            _call(
                library, "AOTInductorModelContainerCreateWithDevice", ctypes.byref(container),
                ctypes.c_size_t(runs_at_once), device.encode(), str(path.parent).encode(),
            )  # fmt: skip
        except BaseException:
            _ctypes.dlclose(library._handle)
            raise
        weakref.finalize(self, _unload, library, container)

    def outputs(self) -> int:
        """How many tensors a run returns."""
        count = ctypes.c_size_t()
        name = "AOTInductorModelContainerGetNumOutputs"
        _call(self._library, name, self._container, ctypes.byref(count))
        return count.value

    def run(self, tensors: Sequence[Any], outputs: int, stream: int = 0) -> list[Any]:
        """stream: of CUDA; 0 is its default one. Raises LibraryError."""
        given = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        # The library takes what it is given, and hands over what it returns.
        inputs = (_Handle * len(given))(*(_pointer_of(each, None) for each in given))
        results = (_Handle * outputs)()
        _call(
            self._library, "AOTInductorModelContainerRun", self._container,
            inputs, ctypes.c_size_t(len(given)), results, ctypes.c_size_t(outputs),
            _Handle(stream), _Handle(),
        )  # fmt: skip
        returned: list[Any] = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(
            [_capsule_of(each, None, None) for each in results]
        )
        return returned


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if getattr(library, name)(*arguments) != 0:
        words = ctypes.c_char_p()
        library.AOTInductorGetLastError(ctypes.byref(words))
        raise LibraryError((words.value or b"no reason given").decode(errors="replace"))


def _unload(library: ctypes.CDLL, container: _Handle) -> None:
    library.AOTInductorModelContainerDelete(container)
    _ctypes.dlclose(library._handle)
