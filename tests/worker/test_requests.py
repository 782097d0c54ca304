# SPDX-License-Identifier: Apache-2.0
"""What `read_request` takes and what it refuses, text by text."""

import os
from typing import Any

import numpy as np
import pytest

from support.sessions import Form, Session
from support.specs import INDEX, SCALE, WORDS, X, a_tensor, spec_of
from thirdrail import dtypes
from thirdrail.dtypes import BY_NAME, encode_bytes, object_array
from thirdrail.errors import FailedPrecondition, InvalidArgument
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.requests import INPUTS_MAX, Request, read_request
from thirdrail_server.worker.version_spec import VersionSpec

PLAIN = spec_of(X)
TWO = spec_of(X, INDEX)
OPTIONAL = spec_of(X, SCALE)
TEXT = spec_of(WORDS)
BATCHED = spec_of(X, INDEX, rows_max=4)

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


def no_memory(name: str, ref: tensor_pb2.ArenaRef) -> Any:
    raise FailedPrecondition(f"tensor '{name}' refers to memory, and there is none")


def read(spec: VersionSpec, *tensors: tensor_pb2.Tensor, **fields: Any) -> Request:
    return read_request(pb.InferRequest(inputs=tensors, **fields), spec, no_memory)


def refusal(spec: VersionSpec, *tensors: tensor_pb2.Tensor, **fields: Any) -> str:
    with pytest.raises(InvalidArgument) as caught:
        read(spec, *tensors, **fields)
    return caught.value.message


# Names. As in Triton, what is missing is told before what is too much: "unexpected" is said only
# to whoever gave everything that is required, which takes a model with optional inputs.


@pytest.mark.parametrize(
    ("spec", "names", "text"),
    [
        (
            TWO,
            ["x"],
            "expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['x'], but missing "
            "required input(s) ['index']. Please provide all required input(s).",
        ),
        (
            TWO,
            [],
            "expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing "
            "required input(s) ['x','index']. Please provide all required input(s).",
        ),
        (
            PLAIN,
            ["X"],
            "expected 1 inputs but got 1 inputs for model 'm'. Got input(s) ['X'], but missing "
            "required input(s) ['x']. Please provide all required input(s).",
        ),
        (
            PLAIN,
            ["x", "other"],
            "expected 1 inputs but got 2 inputs for model 'm'. Got input(s) ['x','other'].",
        ),
        (
            OPTIONAL,
            ["scale"],
            "expected number of inputs between 1 and 2 but got 1 inputs for model 'm'. Got "
            "input(s) ['scale'], but missing required input(s) ['x']. Please provide all required "
            "input(s).",
        ),
        (
            OPTIONAL,
            ["x", "scale", "other"],
            "expected number of inputs between 1 and 2 but got 3 inputs for model 'm'. Got "
            "input(s) ['x','scale','other'].",
        ),
        (OPTIONAL, ["x", "other"], "unexpected inference input 'other' for model 'm'"),
        (PLAIN, ["x", "x"], "input 'x' already exists in request"),
        (
            PLAIN,
            [str(number) for number in range(INPUTS_MAX + 1)],
            f"a request takes at most {INPUTS_MAX} inputs, got {INPUTS_MAX + 1}",
        ),
    ],
    ids=[
        "one missing",
        "all missing",
        "wrongly named",
        "one too many",
        "the required one missing",
        "more than all",
        "unexpected",
        "twice",
        "far too many",
    ],
)
def test_names_that_are_not_the_models(spec: VersionSpec, names: list[str], text: str) -> None:
    assert refusal(spec, *(a_tensor(name) for name in names)) == text


def test_optional_inputs_may_be_left_out_or_given() -> None:
    assert set(read(OPTIONAL, a_tensor()).inputs) == {"x"}
    given_too = read(OPTIONAL, a_tensor(), a_tensor("scale", shape=(1,)))
    assert set(given_too.inputs) == {"x", "scale"}


def test_inputs_may_come_in_any_order() -> None:
    request = read(TWO, a_tensor("index", "INT64", (2,)), a_tensor())
    assert {name: array.shape for name, array in request.inputs.items()} == {
        "x": (2, 3),
        "index": (2,),
    }


# Types and shapes


@pytest.mark.parametrize(
    ("value", "said"), [(BY_NAME["INT32"].value, "INT32"), (0, "0"), (99, "99")]
)
def test_a_data_type_that_is_not_the_models(value: int, said: str) -> None:
    tensor = a_tensor()
    tensor.data_type = value  # type: ignore[assignment]
    assert refusal(PLAIN, tensor) == (
        f"inference input 'x' data-type is '{said}', but model 'm' expects 'FP32'"
    )


@pytest.mark.parametrize("shape", [(2, 4), (3,), (), (1, 2, 3)], ids=str)
def test_a_shape_that_is_not_the_models(shape: tuple[int, ...]) -> None:
    got = ",".join(map(str, shape))
    assert refusal(PLAIN, a_tensor(shape=shape)) == (
        f"unexpected shape for input 'x' for model 'm'. Expected [-1,3], got [{got}]."
    )


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((-1, 3), "tensor 'x' has a negative dimension in its shape [-1, 3]"),
        ((2**62, 3), f"tensor 'x' has the shape [{2**62}, 3], more than {2**48} elements"),
        ((2**63 - 1, 3), f"tensor 'x' has the shape [{2**63 - 1}, 3], more than {2**48} elements"),
        ((0, 2**60), f"tensor 'x' has the shape [0, {2**60}], more than {2**48} elements"),
        ((1,) * 17, "tensor 'x' has 17 dimensions, expected at most 16"),
    ],
    ids=["negative", "wraps to small", "largest", "hidden by a zero", "rank"],
)
def test_dimensions_that_no_tensor_has(shape: tuple[int, ...], text: str) -> None:
    assert refusal(PLAIN, a_tensor(shape=shape, raw=b"")) == text


def test_rows_within_the_models_bound_that_agree() -> None:
    request = read(BATCHED, a_tensor(shape=(4, 3)), a_tensor("index", "INT64", (4,)))
    assert request.rows == 4
    assert read(PLAIN, a_tensor(shape=(4, 3))).rows == 1  # its rows are its own affair


@pytest.mark.parametrize(
    ("rows", "index_rows", "text"),
    [
        (5, 5, "inference request batch-size must be <= 4 for 'm', got 5"),
        (0, 0, "inference request batch-size must be >= 1 for 'm', got 0"),
        (2, 3, "input 'index' batch size does not match other inputs for 'm'"),
        (2, 0, "input 'index' batch size does not match other inputs for 'm'"),
    ],
)
def test_rows_that_the_model_does_not_take(rows: int, index_rows: int, text: str) -> None:
    tensors = (a_tensor(shape=(rows, 3)), a_tensor("index", "INT64", (index_rows,)))
    assert refusal(BATCHED, *tensors) == text


# Data


def test_all_forms_hold_the_same(session: Session) -> None:
    forms: list[Form] = ["raw", "values", "ref"]
    for form in forms:
        request = read_request(session.message({"x": ROWS}, form=form), PLAIN, session.input.view)
        assert request.inputs["x"].dtype == np.float32
        assert request.inputs["x"].tolist() == ROWS.tolist()
        assert request.input_bytes == ROWS.nbytes


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (
            tensor_pb2.Tensor(name="x", data_type=BY_NAME["FP32"].value, shape=(2, 3)),
            "unable to find data for input tensor 'x' for model 'm' in request.",
        ),
        (
            a_tensor(raw=bytes(25)),
            "input byte size mismatch for input 'x' for model 'm'. Expected 24, got 25",
        ),
        (
            a_tensor(raw=b""),
            "input byte size mismatch for input 'x' for model 'm'. Expected 24, got 0",
        ),
        (
            a_tensor(shape=(2**46, 3), raw=bytes(24)),
            f"input byte size mismatch for input 'x' for model 'm'. Expected {3 * 2**48}, got 24",
        ),
        (
            a_tensor(values=tensor_pb2.Values(floats=[1])),
            "tensor 'x' of shape [2, 3] needs 6 values, got 1",
        ),
        (
            a_tensor(values=tensor_pb2.Values(ints=range(6))),
            "tensor 'x' of type FP32 takes its values from 'floats', got 'ints'",
        ),
    ],
    ids=["none", "long", "short", "far too short", "too few values", "values of another type"],
)
def test_data_that_do_not_fit(tensor: tensor_pb2.Tensor, text: str) -> None:
    assert refusal(PLAIN, tensor) == text


@pytest.mark.parametrize("shape", [(0, 3), (2**40, 0), (0, 0)], ids=str)
def test_an_empty_tensor_needs_no_data(shape: tuple[int, int]) -> None:
    spec = spec_of(TensorSpec("x", BY_NAME["FP32"], (-1, -1)))
    without = tensor_pb2.Tensor(name="x", data_type=BY_NAME["FP32"].value, shape=shape)
    for tensor in (without, a_tensor(shape=shape, raw=b"")):
        assert read(spec, tensor).inputs["x"].shape == shape


def test_an_empty_tensor_may_lie_anywhere_in_memory(session: Session) -> None:
    size = session.place(ROWS).size
    end = len(session.input.view("x", tensor_pb2.ArenaRef(epoch=session.input.epoch, size=size)))
    assert end == size
    for offset in (0, session.input.total_bytes):
        ref = tensor_pb2.ArenaRef(epoch=session.input.epoch, offset=offset)
        message = pb.InferRequest(inputs=[a_tensor(shape=(0, 3), ref=ref)])
        assert read_request(message, PLAIN, session.input.view).inputs["x"].shape == (0, 3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            encode_bytes([b"ab"]),
            "expected 2 string elements for inference input 's' for model 'm', got 1",
        ),
        (b"", "expected 2 string elements for inference input 's' for model 'm', got 0"),
        (
            encode_bytes([b"ab", b"c", b""]),
            "unexpected number of string elements 3 for inference input 's' for model 'm', "
            "expecting 2",
        ),
        (
            encode_bytes([b"ab"]) + b"\1\0\0",
            "incomplete string length indicator for inference input 's' for model 'm', expecting "
            "4 bytes but only 3 bytes available",
        ),
        (
            encode_bytes([b"ab"]) + b"\xff\xff\xff\xff.",
            "incomplete string data for inference input 's' for model 'm', expecting string of "
            "length 4294967295 but only 1 bytes available",
        ),
    ],
    ids=["too few", "none", "too many", "cut in a length", "lying length"],
)
def test_text_whose_lengths_do_not_add_up(data: bytes, text: str) -> None:
    assert refusal(TEXT, a_tensor("s", "BYTES", (2,), raw=data)) == text


def test_text_is_copied_before_it_is_looked_at(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that writes while its lengths are being read changes nothing."""
    words = object_array([b"one", b"longer"], (2,))
    message = session.message({"s": words}, form="ref")
    decode = dtypes.decode_bytes

    def scribble_and_decode(*arguments: Any) -> list[bytes]:
        os.pwrite(session.input_fd, b"\xff" * message.inputs[0].ref.size, 0)
        return decode(*arguments)

    monkeypatch.setattr(dtypes, "decode_bytes", scribble_and_decode)
    request = read_request(message, TEXT, session.input.view)
    assert request.inputs["s"].tolist() == [b"one", b"longer"]
    with pytest.raises(InvalidArgument):
        read_request(message, TEXT, session.input.view)  # now everybody sees it


def test_memory_that_is_not_the_sessions_is_refused_as_such() -> None:
    message = pb.InferRequest(inputs=[a_tensor(ref=tensor_pb2.ArenaRef(size=24))])
    with pytest.raises(FailedPrecondition, match="tensor 'x' refers to memory"):
        read_request(message, PLAIN, no_memory)


def test_what_the_model_reads_as_an_index_is_to_be_copied_first(session: Session) -> None:
    spec = spec_of(X, INDEX, WORDS)
    inputs = {
        "x": ROWS,
        "index": np.array([1, 0]),
        "s": object_array([b"a", b"b"], (2,)),  # has been copied
    }
    by_ref = read_request(session.message(inputs, form="ref"), spec, session.input.view)
    assert by_ref.copy_first == ("index",)
    inline = read_request(session.message(inputs), spec, session.input.view)
    assert inline.copy_first == ()


def test_memory_is_looked_at_where_it_lies(session: Session) -> None:
    message = session.message({"x": ROWS}, form="ref")
    request = read_request(message, PLAIN, session.input.view)
    assert request.inputs["x"].ctypes.data == session.input_address(message.inputs[0].ref)


# Batches


def test_the_signature_is_everything_but_the_rows() -> None:
    spec = spec_of(
        TensorSpec("x", BY_NAME["FP32"], (-1, -1)),
        TensorSpec("w", BY_NAME["FP32"], (-1,), True),
        rows_max=8,
    )

    def signature(*tensors: tensor_pb2.Tensor) -> tuple[object, ...]:
        return read(spec, *tensors).signature

    three = signature(a_tensor(shape=(1, 3)))
    assert signature(a_tensor(shape=(2, 3))) == three
    assert signature(a_tensor(shape=(1, 4))) != three
    with_w = signature(a_tensor(shape=(1, 3)), a_tensor("w", shape=(1,)))
    assert with_w != three
    assert signature(a_tensor("w", shape=(1,)), a_tensor(shape=(1, 3))) == with_w


def test_two_requests_are_never_equal() -> None:
    assert read(PLAIN, a_tensor()) != read(PLAIN, a_tensor())
