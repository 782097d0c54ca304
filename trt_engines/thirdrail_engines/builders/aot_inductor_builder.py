# SPDX-License-Identifier: Apache-2.0
"""AOTInductor's builder: a torch.export program as native code, for this CPU or the GPU at hand.

Its time goes to the C++ compiler. By default it compiles PyTorch's headers for later files first,
and a build has two; and it tries each instruction set with a program of its own, in a new process.
Both are left out. (Seen for two layers: 23 to 34 s with them, 10 s without.)

On CUDA this was not yet run on a GPU.
"""

import os
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from thirdrail.tensors import TensorSpec
from thirdrail_engines.builders.cpp_compiler import compiler_in
from thirdrail_engines.builds.result import Built, PlanTensor
from thirdrail_engines.plans import PlanRequest, TellProgress
from thirdrail_engines.torch_plan import write_plan
from thirdrail_engines.torch_sources.exported import (
    Exported,
    changes_itself,
    load_exported,
)
from thirdrail_engines.torch_sources.quiet import quiet_exporter
from thirdrail_engines.torch_sources.reading import refusal, tidy
from thirdrail_engines.torch_sources.sizes import sizes_of

_STEPS = 3

_OPTIONS: dict[str, Any] = {
    "aot_inductor.precompile_headers": False,
    "aot_inductor.enable_line_tables": False,
    "cpp.vec_isa_ok": True,
    # Else the number of threads is fixed by the machine and moment of the build.
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
    "freezing": True,  # weights are laid out for their kernels now, and not in each run
}
# The files beside a library are gone when it runs.
_OPTIONS_OF_GPU = {**_OPTIONS, "aot_inductor.embed_kernel_binary": True}


def build(request: PlanRequest, model: Path, folder: Path, tell: TellProgress) -> Built:
    """model: the `.pt2` file. compute_capabilities of the request: that of the GPU at hand; without
    any, it is for this CPU.

    Raises BuildError: MISSING without a C++ compiler that works, REFUSED for a program that cannot
    be compiled or whose demands compiled code would not check.
    """
    compiler = compiler_in(folder)
    tell("reading", 0, _STEPS)
    exported = load_exported(model)
    _check_program(model, exported)
    sizes = sizes_of(model, exported)
    outputs = [spec for _, spec in exported.outputs]
    tell("compiling", 1, _STEPS)
    is_for_gpu = bool(request.compute_capabilities)
    package = _compile(model, exported, folder, compiler, is_for_gpu=is_for_gpu)
    tell("writing", 2, _STEPS)
    plan = folder / "model.plan"
    write_plan(plan, package, exported.inputs, outputs, sizes)
    layers = Counter(
        str(node.target) for node in exported.program.graph.nodes if node.op == "call_function"
    )
    tensors = (*_tensors(exported.inputs, is_input=True), *_tensors(outputs, is_input=False))
    return Built(plan, {}, dict(layers.most_common()), tensors)


def _check_program(path: Path, exported: Exported) -> None:
    if exported.changed:
        raise refusal(path, changes_itself(exported.changed))
    returned = exported.program.call_spec.out_spec.num_leaves
    if len(exported.outputs) != returned:
        raise refusal(
            path,
            f"{returned - len(exported.outputs)} of its {returned} outputs are no tensors, which "
            "compiled code does not return: return tensors only",
        )


def _compile(
    path: Path, exported: Exported, folder: Path, compiler: Path, *, is_for_gpu: bool
) -> Path:
    package = folder / "package.pt2"
    # It would be named after the user, and users need no name.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    program = exported.program
    try:
        with quiet_exporter():
            if is_for_gpu:
                program = torch.export.passes.move_to_device_pass(program, "cuda")
            options = _OPTIONS_OF_GPU if is_for_gpu else _OPTIONS
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=str(package),
                inductor_configs={**options, "cpp.cxx": (None, str(compiler))},
            )
    except Exception as error:  # its parts raise whatever they happen to
        raise refusal(path, f"AOTInductor cannot compile it: {tidy(error)}") from None
    check_package(path, package)
    return package


def check_package(path: Path, package: Path) -> None:
    """Raises BuildError REFUSED for what cannot run as a library by itself."""
    with zipfile.ZipFile(package) as archive:
        names = [Path(name) for name in archive.namelist()]
        others = [
            name for name in names if name.suffix == ".json" and _lists_operators(archive, name)
        ]
    if sum(name.suffix == ".so" for name in names) != 1:
        raise refusal(path, "AOTInductor made no library of it")
    if others:
        raise refusal(path, "AOTInductor leaves some of its operators to PyTorch, by their name")


def _lists_operators(archive: zipfile.ZipFile, member: Path) -> bool:
    """Whether it is the list of those that the library has somebody else call."""
    return b'"nodes"' in archive.read(str(member))


def _tensors(specs: Any, *, is_input: bool) -> Iterator[PlanTensor]:
    spec: TensorSpec
    for spec in specs:
        yield PlanTensor(spec.name, spec.dtype.name, spec.shape, is_input)
