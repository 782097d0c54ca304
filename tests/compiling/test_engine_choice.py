# SPDX-License-Identifier: Apache-2.0
"""Which engines may run a model, in order."""

import pytest

from thirdrail_engines.compile_options import CompileOptions, EngineChoice, read_compile_options
from thirdrail_engines.engine_choice import Host, engine_order
from thirdrail_engines.plans import Builder, Precision

CPU = Host()
CPU_WITH_TORCH = Host(has_torch=True)
GPU = Host(
    has_cuda=True,
    tensorrts=(Builder.TENSORRT, Builder.TENSORRT_RTX),
    has_torch=True,
    has_onnxruntime_cuda=True,
)
ONNX, EXPORTED = ".onnx", ".pt2"
KEPT = {"keep_optimised": "true"}
COMPILED = {"torch_compile": "aot_inductor"}

NAMES = {
    "source": "onnxruntime",
    "plan": "onnxruntime plan",
    "onnx_gpu": "onnxruntime on cuda",
    "trt": "tensorrt on cuda",
    "rtx": "tensorrt_rtx on cuda",
    "torch": "torch",
    "torch_gpu": "torch on cuda",
    "aot": "torch aot_inductor",
    "aot_gpu": "torch aot_inductor on cuda",
}


@pytest.mark.parametrize(
    ("source", "parameters", "host", "expected"),
    [
        (ONNX, {}, CPU, "source"),
        (ONNX, KEPT, CPU, "plan source"),
        (ONNX, {"precision": "fp16"}, CPU, "plan source"),
        (EXPORTED, {}, CPU, "plan"),
        (EXPORTED, {}, CPU_WITH_TORCH, "plan torch"),
        (EXPORTED, {"engine": "torch"}, CPU_WITH_TORCH, "torch plan"),
        # Compiled first, then operator by operator; PyTorch runs neither TorchScript nor ONNX.
        (EXPORTED, COMPILED, CPU_WITH_TORCH, "plan aot torch"),
        (EXPORTED, {"engine": "torch", **COMPILED}, CPU_WITH_TORCH, "aot torch plan"),
        (EXPORTED, COMPILED, GPU, "trt rtx aot_gpu torch_gpu plan aot torch"),
        (EXPORTED, COMPILED, CPU, "plan"),
        (".pt", COMPILED, CPU_WITH_TORCH, "plan"),
        (".pt", {"engine": "torch"}, CPU_WITH_TORCH, "torch plan"),
        (".pt", {}, GPU, "trt rtx plan"),
        (ONNX, COMPILED, CPU_WITH_TORCH, "source"),
        (ONNX, {}, GPU, "trt rtx onnx_gpu source"),
        (ONNX, KEPT, GPU, "trt rtx onnx_gpu plan source"),
        (EXPORTED, {}, GPU, "trt rtx torch_gpu plan torch"),
        # Asked for by name: first, and what it falls back to is another kind of engine.
        (ONNX, {"engine": "tensorrt_rtx"}, GPU, "rtx onnx_gpu source"),
        (EXPORTED, {"engine": "tensorrt"}, GPU, "trt torch_gpu plan torch"),
        (EXPORTED, {"engine": "torch"}, GPU, "torch_gpu torch plan"),
        (ONNX, {"engine": "onnxruntime"}, GPU, "onnx_gpu source"),
        # Asked for, and not here: the attempt fails, and says why.
        (ONNX, {"engine": "tensorrt"}, CPU, "trt source"),
        (ONNX, {"engine": "torch"}, CPU, "torch source"),
    ],
)
def test_the_order(source: str, parameters: dict[str, str], host: Host, expected: str) -> None:
    order = engine_order(source, read_compile_options(parameters), host, keeps_plans=True)
    assert [each.name for each in order] == [NAMES[each] for each in expected.split()]


def test_plans_that_cannot_be_kept_are_not_made_without_need() -> None:
    def names(source: str, options: CompileOptions) -> list[str]:
        order = engine_order(source, options, CPU, keeps_plans=False)
        return [each.name for each in order]

    assert names(ONNX, CompileOptions(keeps_optimised=True)) == ["onnxruntime"]
    assert names(EXPORTED, CompileOptions()) == ["onnxruntime plan"]
    assert names(ONNX, CompileOptions(precision=Precision.BF16))[0] == "onnxruntime plan"


def test_every_engine_can_be_asked_for_everywhere() -> None:
    for host in (CPU, CPU_WITH_TORCH, GPU):
        for source in (ONNX, EXPORTED):
            for engine in EngineChoice:
                order = engine_order(source, CompileOptions(engine=engine), host, keeps_plans=True)
                assert engine in (EngineChoice.AUTO, order[0].engine)
                assert len(set(order)) == len(order)
