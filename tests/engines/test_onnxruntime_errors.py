# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's texts become ours: samples as it wrote them."""

from pathlib import Path

import numpy as np
import pytest

from thirdrail_engines.onnxruntime_errors import run_failure, tidy


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : Non-zero status code returned while "
            "running Gather node. Name:'pick' Status Message: indices element out of data bounds",
            "Gather node 'pick': indices element out of data bounds",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape "
            "node. Name:'' Status Message: /onnxruntime_src/onnxruntime/core/providers/cpu/tensor/"
            "reshape_helper.h:91 onnxruntime::ReshapeHelper::ReshapeHelper(const onnxruntime::"
            "TensorShape&, onnxruntime::TensorShapeVector&, bool) input_shape_size == "
            "requested_shape_size was false. The input tensor cannot be reshaped.\n",
            "Reshape node: input_shape_size == requested_shape_size was false. "
            "The input tensor cannot be reshaped.",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from /m/a.onnx failed:/onnxruntime_src/"
            "onnxruntime/core/graph/model_load_utils.h:46 void onnxruntime::model_load_utils::"
            "ValidateOpsetForDomain(const std::unordered_map<std::__cxx11::basic_string<char>, "
            "int>&, const onnxruntime::logging::Logger&, bool) Opset 99 is under development.\n",
            "Opset 99 is under development.",
        ),
        (
            "Error in execution: Non-zero status code returned while running Identity node. "
            "Name:'' Status Message: /onnxruntime_src/onnxruntime/core/framework/op_kernel.cc:87 "
            "virtual OrtValue* onnxruntime::OpKernelContext::OutputMLValue(int, const "
            "onnxruntime::TensorShape&) [ONNXRuntimeError] : 2 : INVALID_ARGUMENT : The output "
            "has shape {3}.\n",
            "Identity node: The output has shape {3}.",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Exception: /onnxruntime_src/onnxruntime/core/common/"
            "safeint.h:17 static void SafeIntExceptionHandler<onnxruntime::OnnxRuntimeException>"
            "::SafeIntOnOverflow() Integer overflow\n",
            "Exception: Integer overflow",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : External data path validation failed. Error: "
            'tensorprotoutils.cc:461 ValidateExternalDataPathFromDir does not exist: "/m/w.bin"',
            'External data path validation failed. Error: does not exist: "w.bin"',
        ),
        (
            "/onnxruntime_src/core/a.cc:9 void onnxruntime::F(int) [with T = float] bad value",
            "bad value",
        ),
        (
            "/onnxruntime_src/core/a.cc:9 a signature that never( ends",
            "a signature that never( ends",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Mod node. "
            "Name:'' Status Message: /onnxruntime_src/onnxruntime/core/providers/cpu/math/"
            "element_wise_ops.cc:2279 void onnxruntime::mod_internal::CallModImpl<T, typename std::"
            "enable_if<std::is_floating_point<_Tp>::value, void>::type>::operator()(bool, "
            "onnxruntime::OpKernelContext*) const [with T = double; typename std::enable_if<std::"
            "is_floating_point<_Tp>::value, void>::type = void] fmod was false. It must be true\n",
            "Mod node: fmod was false. It must be true",
        ),
        ("", ""),
        ("plain text (as it is) stays", "plain text (as it is) stays"),
    ],
    ids=range(11),
)
def test_only_what_a_reader_can_use_is_left(message: str, expected: str) -> None:
    assert tidy(message, Path("/m")) == expected


def test_a_long_text_is_cut() -> None:
    text = tidy("word " * 10_000)
    assert len(text) == 1000
    assert text.endswith("...")


def test_a_kernel_without_a_reason_is_named_still_and_few_of_many_inputs_are() -> None:
    silent = "Non-zero status code returned while running ArgMax node. Name:'' Status Message: "
    inputs = {f"x{i}": np.zeros((i, 2)) for i in range(10)}
    text = str(run_failure(RuntimeError(silent), inputs))
    assert text.startswith("the model cannot compute with 'x0' [0, 2], 'x1' [1, 2], ")
    assert text.endswith(", 'x7' [7, 2], 2 more: ArgMax node")
