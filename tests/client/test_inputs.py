# SPDX-License-Identifier: Apache-2.0
"""What callers may pass as a tensor, and what becomes of it."""

import array as arrays
import mmap
import re
from typing import Any, cast

import numpy as np
import pytest

from thirdrail.arrays import array_of_value, has_dtype
from thirdrail.dtypes import BY_NAME, encode_bytes
from thirdrail.errors import InvalidArgument
from thirdrail.lane.encoding import Encoder
from thirdrail.models import DescriptionCache, ModelDescription, ModelStatus, describe_request
from thirdrail.requests import InferOptions, Result, needs_description, write_request
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2


class OnlyDlpack:
    """An array of a library that numpy has never heard of."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class OnDevice(OnlyDlpack):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("cannot export memory of cuda:0")


class RequiresGrad:
    """Refuses as a tensor under autograd does."""

    def __array__(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("can't call numpy() on a tensor that requires grad")


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec("x", BY_NAME[name], shape)


def test_arrays_of_any_library_are_sent_as_they_are() -> None:
    given = np.arange(4, dtype=np.float64)
    for value in (given, OnlyDlpack(given), given.data):
        assert has_dtype(value)
        sent = array_of_value("x", value, None)
        assert sent.dtype == np.float64  # also for a model that wants FP32: the server says so
        assert np.shares_memory(sent, given)


def test_buffers_have_their_own_type() -> None:
    mapped = mmap.mmap(-1, 4)
    assert array_of_value("x", bytearray(b"ab"), None).dtype == np.uint8
    assert array_of_value("x", arrays.array("i", [7]), None).tolist() == [7]
    assert array_of_value("x", mapped, None).nbytes == 4


@pytest.mark.parametrize("value", [OnDevice(np.zeros(1)), RequiresGrad()])
def test_what_cannot_be_read_says_why(value: object) -> None:
    with pytest.raises(InvalidArgument, match=r"as input 'x': (cannot export|can't call)"):
        array_of_value("x", value, None)


@pytest.mark.parametrize(
    ("value", "dtype", "wanted"),
    [
        ([[1, 2.5]], "FP32", np.array([[1, 2.5]], np.float32)),
        ([1, 2], "UINT8", np.array([1, 2], np.uint8)),
        ([True, 0], "INT64", np.array([1, 0], np.int64)),
        ([True, False], "BOOL", np.array([True, False])),
        ([0.5], "BF16", None),
        ([1e10], "FP16", np.array([np.inf], np.float16)),
        ([(1 << 64) - 1], "UINT64", np.array([(1 << 64) - 1], np.uint64)),
        ([[1 << 63, 1]], "UINT64", np.array([[1 << 63, 1]], np.uint64)),  # FP64 to numpy
        ([1 << 64], "FP32", np.array([1 << 64], np.float32)),
        ([], "INT32", np.array([], np.int32)),
        ([np.float32(1.5)], "FP64", np.array([1.5])),
    ],
)
def test_lists_take_the_declared_type(value: Any, dtype: str, wanted: Any) -> None:
    sent = array_of_value("x", value, spec(dtype, -1))
    assert sent.dtype == BY_NAME[dtype].numpy
    if wanted is not None:
        np.testing.assert_array_equal(sent, wanted, strict=True)


@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        ([1.5], "INT32", "float64, expected INT32"),
        (["1"], "FP32", "<U1, expected FP32"),
        ([None], "FP32", "object, expected FP32"),
        (None, "FP32", "object, expected FP32"),
        ([256], "UINT8", "256 does not fit UINT8"),
        ([-1], "UINT64", "-1 does not fit UINT64"),
        ([1 << 70], "INT64", "1180591620717411303424 does not fit INT64"),
        ([1.0, 1 << 63], "UINT64", "float64, expected UINT64"),
        ([1], "BOOL", "int64, expected BOOL"),
        ([[1, 2], [3]], "INT32", "inhomogeneous"),
        (b"raw", "FP32", "np.frombuffer"),
        ([b"a", 1], "BYTES", "as input 'x': a BYTES element must be bytes or str"),
    ],
)
def test_nothing_is_rounded_parsed_or_invented(value: Any, dtype: str, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        array_of_value("x", value, spec(dtype, -1))


@pytest.mark.parametrize("bad", [np.zeros(2, "c8"), np.array(["a", 1], object)])
def test_an_array_that_cannot_be_sent_is_named(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="input 'x': "):
        request_of({"x": bad})
    with pytest.raises(InvalidArgument, match="input 'x': "):
        Encoder().inputs({"x": bad}, 100)


def test_what_is_masked_is_not_sent_as_if_it_were_not() -> None:
    masked = np.ma.array([1, 2], mask=[False, True], dtype=np.float32)
    with pytest.raises(InvalidArgument, match=r"MaskedArray as input 'x': its mask cannot be sent"):
        array_of_value("x", masked, None)
    assert array_of_value("x", masked.filled(7), None).tolist() == [1, 7]
    assert array_of_value("x", masked[:1], None).tolist() == [1]  # nothing of it is masked


def test_the_name_of_an_input_is_text() -> None:
    inputs: Any = {1: np.zeros(1)}
    with pytest.raises(InvalidArgument, match="the name of an input must be a str, got the int 1"):
        request_of(inputs)
    with pytest.raises(InvalidArgument, match="the name of an input must be a str, got the int 1"):
        Encoder().inputs(inputs, 100)


def test_text_of_numpys_own_type_is_bytes() -> None:
    text = np.array(["a", "\u00e4"], np.dtypes.StringDType())
    assert request_of({"x": text}).inputs[0].raw == encode_bytes(["a", "\u00e4"])


@pytest.mark.needs_torch
def test_a_tensor_of_bf16_is_sent_without_a_copy() -> None:
    import torch

    given = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    sent = array_of_value("x", given.T, None)
    assert (sent.dtype, sent.tolist()) == (BY_NAME["BF16"].numpy, [[0, 3], [1, 4], [2, 5]])
    given[0, 0] = 7
    assert sent[0, 0] == 7


def test_one_value_gets_the_declared_rank() -> None:
    assert array_of_value("x", 3, spec("FP32", -1, 1)).shape == (1, 1)
    assert array_of_value("x", "häl", spec("BYTES", -1)).tolist() == ["häl"]
    assert array_of_value("x", b"\0", spec("BYTES", 1, 1)).tolist() == [[b"\0"]]
    assert array_of_value("x", 3, spec("INT8")).shape == ()


def test_text_lists_keep_their_shape() -> None:
    assert array_of_value("x", [["a", b"b"]], spec("BYTES", -1, 2)).shape == (1, 2)


# -- requests ----------------------------------------------------------------------------------


def described(*inputs: TensorSpec) -> ModelDescription:
    status = ModelStatus("m", 1, "ready", "", "", "")
    output = TensorSpec("y", BY_NAME["FP32"], (-1,))
    return ModelDescription(status, (1,), inputs, (output,), 0, 1, "", (), ())


def request_of(inputs: Any, description: Any = None, **options: Any) -> pb.InferRequest:
    request = pb.InferRequest()
    write_request(request, "m", inputs, description, **options)
    return request


@pytest.mark.parametrize(
    ("inputs", "options", "needed"),
    [
        ({"x": np.zeros(1)}, {}, False),
        ({}, {}, False),
        ({"x": [1]}, {}, True),
        ({"x": "text"}, {}, True),
        (np.zeros(1), {}, True),
        ({"x": np.zeros(1)}, {"classes": 2}, True),
        ({"x": np.zeros(1)}, {"classes": 2, "outputs": ["y"]}, False),
        ({"x": np.zeros(1)}, {"classes": 0, "outputs": []}, False),
    ],
)
def test_the_model_is_asked_only_where_needed(
    inputs: Any, options: InferOptions, needed: bool
) -> None:
    assert needs_description(inputs, options) is needed


def test_every_option_reaches_the_message() -> None:
    request = request_of(
        {"x": np.zeros((2, 0), np.int8)},
        outputs=["b", "a"],
        version=7,
        request_id="r",
        timeout=0.25,
        priority=3,
        parameters={"t": True, "i": -5, "u": 1 << 63, "f": 0.5, "s": "text"},
        classes=2,
    )
    assert (request.model_name, request.model_version) == ("m", 7)
    assert [(o.name, o.class_count) for o in request.outputs] == [("b", 2), ("a", 2)]
    assert (request.request_id, request.timeout_us, request.priority) == ("r", 250_000, 3)
    found = {n: (p.WhichOneof("value"), p) for n, p in request.parameters.items()}
    assert {n: kind for n, (kind, _) in found.items()} == {
        "t": "bool_value",
        "i": "int_value",
        "u": "uint_value",
        "f": "double_value",
        "s": "string_value",
    }
    [tensor] = request.inputs
    assert (tensor.name, tensor.data_type, list(tensor.shape)) == (
        "x",
        tensor_pb2.DATA_TYPE_INT8,
        [2, 0],
    )
    assert tensor.WhichOneof("data") == "raw"


@pytest.mark.parametrize("bad", [{"p": None}, {"p": [1]}, {"p": 1 << 64}, {"p": -(1 << 63) - 1}])
def test_parameters_of_other_types_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="parameter 'p' must"):
        request_of({}, parameters=bad)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), float("inf"), 1e10])
def test_a_timeout_is_above_0_and_finite(bad: float) -> None:
    with pytest.raises(InvalidArgument, match="above 0"):
        request_of({}, timeout=bad)


def test_the_shortest_timeout_is_not_none_at_all() -> None:
    assert request_of({}, timeout=1e-9).timeout_us == 1
    assert request_of({}, timeout=np.int64(3)).timeout_us == 3_000_000


@pytest.mark.parametrize(
    "bad",
    [
        {"priority": 1 << 40},
        {"version": 1 << 70},
        {"request_id": "\ud800"},
        {"outputs": ["\ud800"]},
    ],
)
def test_what_a_message_cannot_hold_is_the_callers_mistake(bad: InferOptions) -> None:
    with pytest.raises(InvalidArgument, match="option of the request cannot be sent"):
        request_of({}, **bad)
    with pytest.raises(InvalidArgument, match="option of the request cannot be sent"):
        Encoder().options("m", None, bad)


def test_outputs_as_one_string_is_a_mistake() -> None:
    with pytest.raises(InvalidArgument, match="sequence of names"):
        request_of({}, outputs="prob")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"version": "1"}, "version must be an int, got the str '1'"),
        ({"version": None}, "version must be an int, got the NoneType None"),
        ({"version": True}, "version must be an int, got the bool True"),
        ({"priority": 1.5}, "priority must be an int, got the float 1.5"),
        ({"priority": -1}, "priority must be 0 or more, got -1"),
        ({"classes": np.int8(-2)}, "classes must be 0 or more, got -2"),
        ({"classes": "2"}, "classes must be an int, got the str '2'"),
        ({"outputs": [3]}, "the name of an output must be a str, got the int 3"),
        ({"outputs": [["y"]]}, "the name of an output must be a str, got the list ['y']"),
        ({"outputs": 3}, "outputs must be a sequence of names, got the int 3"),
        ({"outputs": iter("yz")}, "outputs must be a sequence of names, got the str_"),
        ({"request_id": 5}, "request_id must be a str, got the int 5"),
        ({"timeout": "1"}, "timeout must be a float or an int, got the str '1'"),
        ({"timeout": np.float32(5)}, "timeout must be a float or an int, got the float32"),
        ({"parameters": [("p", 1)]}, "parameters must be a mapping from names to values, got the"),
        ({"parameters": {1: 1}}, "the name of a parameter must be a str, got the int 1"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(bad: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        request_of({}, **bad)
    encoder = Encoder()
    for equal in ({"timeout": 5.0}, {"version": 1}):  # to that of FP32, and to True; and kept
        encoder.options("m", None, cast(InferOptions, equal))
    with pytest.raises(InvalidArgument, match=re.escape(said)):
        encoder.options("m", None, bad)
    with pytest.raises(InvalidArgument, match=r"a model must be a str, got the list \['m'\]"):
        encoder.options(cast(str, ["m"]), None, {})


@pytest.mark.parametrize(
    ("model", "version"), [(3, 0), (None, 0), ("\ud800", 0), ("m", 1 << 70), ("m", "1")]
)
def test_a_model_that_cannot_be_asked_for_is_named(model: Any, version: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"no model is called|the name of a model must be a"):
        describe_request(model, version)


def test_scalars_of_numpy_are_parameters() -> None:
    given = {"i": np.int64(-2), "f": np.float32(0.5), "b": np.bool_(True), "s": np.str_("x")}
    parameters = request_of({}, parameters=given).parameters
    assert (parameters["i"].int_value, parameters["f"].double_value) == (-2, 0.5)
    assert (parameters["b"].bool_value, parameters["s"].string_value) == (True, "x")


def test_an_option_of_another_name_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="'timeout_s' is no option of a request, expected one of"):
        request_of({}, timeout_s=1)
    for value in (1, ["y"]):
        with pytest.raises(TypeError, match="names"):
            Encoder().options("m", None, {"names": value})  # type: ignore[typeddict-unknown-key]


def test_a_tensor_alone_is_for_models_with_one_input() -> None:
    request = request_of([1], described(spec("FP32", -1)))
    assert request.inputs[0].name == "x"
    two = described(TensorSpec("a", BY_NAME["FP32"], ()), TensorSpec("b", BY_NAME["FP32"], ()))
    with pytest.raises(InvalidArgument, match=r"2 inputs \(a, b\)"):
        request_of([1], two)


def test_a_plain_value_for_an_unknown_input() -> None:
    with pytest.raises(InvalidArgument, match="unknown input 'z', the model has x"):
        request_of({"z": [1]}, described(spec("FP32", -1)))


def test_classes_of_all_outputs_by_default() -> None:
    request = request_of({"x": [1]}, described(spec("FP32", -1)), classes=3)
    assert [(o.name, o.class_count) for o in request.outputs] == [("y", 3)]


def test_results_are_read_only_mappings() -> None:
    tensors = [
        tensor_pb2.Tensor(
            name="f", data_type=tensor_pb2.DATA_TYPE_FP32, shape=[1], raw=b"\0\0\x80?"
        ),
        tensor_pb2.Tensor(
            name="s",
            data_type=tensor_pb2.DATA_TYPE_BYTES,
            shape=[1],
            values=tensor_pb2.Values(strings=["a"]),
        ),
        tensor_pb2.Tensor(
            name="i",
            data_type=tensor_pb2.DATA_TYPE_INT8,
            shape=[1],
            values=tensor_pb2.Values(ints=[-1]),
        ),
    ]
    result = Result(pb.InferResponse(model_name="m", model_version=2, outputs=tensors))
    assert list(result) == ["f", "s", "i"]
    assert len(result) == 3
    assert {name: array.tolist() for name, array in result.items()} == {
        "f": [1.0],
        "s": [b"a"],
        "i": [-1],
    }
    for array in result.values():
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[0]
    assert repr(result) == "<Result of m version 2: f: float32[1], s: object[1], i: int8[1]>"


def test_descriptions_are_forgotten_soon_and_never_many() -> None:
    cache = DescriptionCache()
    cache.put("m", 0, described(), now_ns=0)
    assert cache.get("m", 0, now_ns=cache.AGE_NS_MAX) is not None
    assert cache.get("m", 0, now_ns=cache.AGE_NS_MAX + 1) is None
    assert cache.get("m", 1, now_ns=0) is None
    for number in range(2 * cache.ENTRIES_MAX):
        cache.put(f"m{number}", 0, described(), now_ns=0)
    assert len(cache._entries) <= cache.ENTRIES_MAX


def test_a_description_is_forgotten_once_if_it_is_older() -> None:
    cache = DescriptionCache()
    cache.put("m", 0, described(), now_ns=5)
    assert not cache.forget_older("m", 0, 5), "it was asked for by this very call"
    assert not cache.forget_older("m", 1, 6)
    assert cache.forget_older("m", 0, 6)
    assert not cache.forget_older("m", 0, 6)
    assert cache.get("m", 0, now_ns=5) is None
