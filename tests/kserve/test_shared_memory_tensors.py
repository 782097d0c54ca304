# SPDX-License-Identifier: Apache-2.0
"""Tensors in registered shared memory, of a real server: where they are read and written, and the
text of every refusal."""

import functools
from typing import Any

import grpc
import numpy as np
import pytest

from support.regions import (
    Input,
    Parameter,
    Regions,
    SharedMemory,
    identity,
    in_region,
    plus_one_in,
    refusal,
    request_of,
    row,
)
from thirdrail.dtypes import DTYPES, encode_bytes

Status = grpc.StatusCode
MIB = 1 << 20
ROW = np.arange(4, dtype=np.float32)


# Reading and writing


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("count", [0, 3, 60_000])
@pytest.mark.parametrize("stream", [False, True])
def test_every_type_goes_through_regions(
    regions: Regions, dtype: Any, count: int, stream: bool
) -> None:
    if dtype.name == "BYTES":
        raw = encode_bytes([b"x" * (number % 20) for number in range(count)])
    else:
        raw = np.arange(count).astype(np.uint8).repeat(dtype.itemsize).tobytes()
        raw = bytes(byte & 1 for byte in raw) if dtype.name == "BOOL" else raw
    size = len(raw)
    with SharedMemory(content=b"abc" + raw) as source, SharedMemory(size + 100) as target:
        regions.register("in", source.key, size + 3)
        regions.register("out", target.key, size + 100)
        where, there = in_region("in", size, 3 if size else 1), in_region("out", size + 50, 7)
        request = identity(dtype.name, count, where, y=there)
        if stream:
            (message,) = regions.stub.ModelStreamInfer(iter([request]))
            assert not message.error_message
            reply = message.infer_response
        else:
            reply = regions.stub.ModelInfer(request)
        assert target.read() == bytes(7) + raw + bytes(93)
        (output,) = reply.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("y", dtype.name, [count])
        assert list(reply.raw_output_contents) == [b""]
        assert not output.parameters
        regions.unregister()


def test_large_tensors_go_through_regions(regions: Regions) -> None:
    raw = np.random.default_rng(1).bytes(16 * MIB)
    with SharedMemory(content=raw) as source, SharedMemory(16 * MIB) as target:
        regions.register("in", source.key, 16 * MIB)
        regions.register("out", target.key, 16 * MIB)
        there = in_region("out", 16 * MIB)
        request = identity("UINT8", 16 * MIB, in_region("in", 16 * MIB), y=there)
        assert list(regions.stub.ModelInfer(request).raw_output_contents) == [b""]
        assert target.read() == raw
        request = identity("UINT8", 16 * MIB, in_region("in", 16 * MIB))
        assert list(regions.stub.ModelInfer(request).raw_output_contents) == [raw]
        regions.unregister()


@pytest.mark.parametrize("in_shm", ["a", "b"])
@pytest.mark.parametrize("extra", [(), (b"ignored",)])
def test_some_inputs_in_a_region_and_some_in_the_request(
    regions: Regions, memory: SharedMemory, in_shm: str, extra: tuple[bytes, ...]
) -> None:
    memory.write((ROW * 10).tobytes(), offset=1)
    inputs = [
        row(name, parameters=in_region("R", 16, 0) if name == in_shm else {}) for name in "ab"
    ]
    reply = regions.stub.ModelInfer(request_of("add", *inputs, raw=(ROW.tobytes(), *extra)))
    assert list(reply.raw_output_contents) == [(ROW * 11).tobytes()]
    assert refusal(lambda: regions.stub.ModelInfer(request_of("add", *inputs))) == (
        Status.INVALID_ARGUMENT,
        f"[request id: r-1] unable to find data for input tensor '{'ab'.replace(in_shm, '')}' for "
        f"model 'add' in request.",
    )


def test_one_region_for_inputs_and_outputs_of_many_calls(
    regions: Regions, memory: SharedMemory
) -> None:
    memory.write(ROW.tobytes(), offset=1)
    where = in_region("R", 16)
    calls = [
        regions.stub.ModelInfer.future(request_of("plus_one", row("a", parameters=where), c=where))
        for _ in range(50)
    ]
    assert {bytes(call.result().raw_output_contents[0]) for call in calls} == {b""}
    result = np.frombuffer(memory.read(16, offset=1), np.float32)
    assert 1 <= result[0] <= 50


# Refusals


@pytest.mark.parametrize(
    ("offset", "size", "text"),
    [
        (MIB - 1, 0, "Invalid offset for shared memory region: 'R'"),
        (-1, 16, "Invalid offset for shared memory region: 'R'"),
        (MIB - 16, 16, "Invalid offset + byte size for shared memory region: 'R'"),
        (0, (1 << 63) - 1, "Invalid offset + byte size for shared memory region: 'R'"),
        (0, -1, "Invalid offset + byte size for shared memory region: 'R'"),
        (32, -32, "Integer overflow detected: byte_size (18446744073709551584) and offset (32) "),
        (MIB - 2, -1, "Integer overflow detected: byte_size ("),
    ],
)
@pytest.mark.parametrize("output", [False, True])
def test_what_is_outside_the_region(
    regions: Regions, memory: SharedMemory, offset: int, size: int, text: str, output: bool
) -> None:
    request = plus_one_in(in_region("R", size, offset), is_output=output)
    code, message = refusal(lambda: regions.stub.ModelInfer(request))
    assert code is Status.INVALID_ARGUMENT
    assert message.startswith(f"[request id: r-1] {text}")


@pytest.mark.parametrize("output", [False, True])
def test_an_unknown_region(regions: Regions, output: bool) -> None:
    request = plus_one_in(in_region("N", 16), is_output=output)
    expected = "Unable to find shared memory region: 'N'"
    assert refusal(lambda: regions.stub.ModelInfer(request)) == (Status.NOT_FOUND, expected)
    (message,) = regions.stub.ModelStreamInfer(iter([request]))
    assert (message.error_message, message.infer_response.id) == (expected, "r-1")


@pytest.mark.parametrize("size", [15, 32, 100_000])
def test_an_inputs_size_is_exact(regions: Regions, memory: SharedMemory, size: int) -> None:
    request = request_of("plus_one", row("a", parameters=in_region("R", size)))
    assert refusal(lambda: regions.stub.ModelInfer(request)) == (
        Status.INVALID_ARGUMENT,
        f"[request id: r-1] input byte size mismatch for input 'a' for model 'plus_one'. Expected "
        f"16, got {size}",
    )


def test_texts_that_make_no_sense(regions: Regions, memory: SharedMemory) -> None:
    memory.write(b"\xff" * 8, offset=1)
    for size, text in ((8, "string"), (3, "incomplete string length indicator")):
        call = functools.partial(
            regions.stub.ModelInfer, identity("BYTES", 1, in_region("R", size))
        )
        code, message = refusal(call)
        assert (code, text in message) == (Status.INVALID_ARGUMENT, True), message


@pytest.mark.parametrize("dtype", ["FP32", "BYTES"])
def test_an_output_that_does_not_fit_its_region(
    regions: Regions, memory: SharedMemory, dtype: str
) -> None:
    raw = encode_bytes([b"x" * 12]) if dtype == "BYTES" else ROW.tobytes()
    shape = [1] if dtype == "BYTES" else [4]
    tensor = Input(name="x", datatype=dtype, shape=shape)
    model = f"identity_{dtype.lower()}"
    request = request_of(model, tensor, raw=(raw,), y=in_region("R", 15))
    assert refusal(lambda: regions.stub.ModelInfer(request)) == (
        Status.INTERNAL,
        "shared memory size specified with the request for output 'y' (15 bytes) should be at "
        "least 16 bytes to hold the results",
    )
    assert memory.read() == bytes(MIB)


def test_classes_cannot_go_to_a_region(regions: Regions, memory: SharedMemory) -> None:
    where = {**in_region("R", 100), "classification": Parameter(int64_param=2)}
    tensor = Input(name="x", datatype="FP32", shape=[1, 3])
    request = request_of("classifier", tensor, raw=(bytes(12),), scores=where)
    assert refusal(lambda: regions.stub.ModelInfer(request)) == (
        Status.INVALID_ARGUMENT,
        "[request id: r-1] output can't set both 'shared_memory_region' and 'classification'",
    )
