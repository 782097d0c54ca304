# SPDX-License-Identifier: Apache-2.0
"""Whatever a message says, `read_request` takes it or refuses it, and raises nothing else."""

import math
from collections.abc import Iterator
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.specs import INDEX, SCALE, WORDS, X, spec_of
from thirdrail.errors import FailedPrecondition, InvalidArgument
from thirdrail.tensors import TensorSpec
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.requests import read_request
from thirdrail_server.worker.version_spec import VersionSpec

T = TypeVar("T")

SPECS = st.sampled_from(
    [spec_of(X), spec_of(X, INDEX), spec_of(X, SCALE), spec_of(WORDS), spec_of(X, rows_max=4)]
)


@pytest.fixture(scope="module")
def arena() -> Iterator[InputArena]:
    arena = InputArena(1 << 20)
    arena.grow(1).close()
    yield arena
    arena.close()


DIMS = st.one_of(st.integers(0, 4), st.sampled_from([-1, 2**31, 2**48, 2**62, 2**63 - 1, -(2**63)]))
SHAPES = st.lists(DIMS, max_size=18)
NUMBERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=8)
VALUES = st.builds(
    tensor_pb2.Values,
    floats=st.one_of(st.just([]), st.lists(st.floats(), max_size=8)),
    ints=st.one_of(st.just([]), NUMBERS),
    strings=st.one_of(st.just([]), st.lists(st.text(max_size=3), max_size=3)),
)
REFS = st.builds(
    tensor_pb2.ArenaRef,
    epoch=st.integers(0, 2),  # 1 becomes the arena's own
    chunk=st.sampled_from([0, 0, 1, 2**32 - 1]),
    offset=st.sampled_from([0, 64, 1, 1 << 20, (1 << 20) - 64, 2**64 - 64]),
    size=st.sampled_from([0, 8, 16, 24, 1 << 20, 2**64 - 1]),
)
OUTPUTS = st.builds(
    pb.RequestedOutput,
    name=st.sampled_from(["y", "z", "words", "other"]),
    form=st.integers(0, 3),
    class_count=st.sampled_from([0, 1, 2**32 - 1]),
)


def mostly(right: st.SearchStrategy[T], wild: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    return st.integers(0, 15).flatmap(lambda number: right if number else wild)


@st.composite
def tensors(draw: st.DrawFn, expected: TensorSpec) -> tensor_pb2.Tensor:
    """One that could be meant for the input, with a few things wrong."""
    open_dim = draw(st.integers(0, 3))
    fitting = [open_dim if dim == -1 else dim for dim in expected.shape]
    shape = draw(mostly(st.just(fitting), SHAPES))
    tensor = tensor_pb2.Tensor(
        name=draw(mostly(st.just(expected.name), st.sampled_from(["x", "index", "", "other"]))),
        data_type=draw(mostly(st.just(expected.dtype.value), st.integers(0, 99))),  # type: ignore[arg-type]
        shape=shape,
    )
    size = math.prod(fitting) * max(expected.dtype.itemsize, 4)  # of as many empty words
    form = draw(st.sampled_from(["raw", "raw", "ref", "values", ""]))
    if form == "raw":
        tensor.raw = draw(mostly(st.just(bytes(size)), st.binary(max_size=64)))
    elif form == "ref":
        tensor.ref.CopyFrom(draw(mostly(st.just(tensor_pb2.ArenaRef(epoch=1, size=size)), REFS)))
    elif form == "values":
        fitting_values = tensor_pb2.Values(floats=[0.0] * math.prod(fitting))
        tensor.values.CopyFrom(draw(mostly(st.just(fitting_values), VALUES)))
    return tensor


@st.composite
def requests(draw: st.DrawFn, spec: VersionSpec) -> pb.InferRequest:
    inputs = [draw(tensors(tensor)) for tensor in spec.inputs.values()]
    extra = draw(mostly(st.just([]), st.lists(tensors(X), max_size=3)))
    outputs = draw(st.lists(OUTPUTS, max_size=2))
    return pb.InferRequest(inputs=[*draw(st.permutations(inputs)), *extra], outputs=outputs)


@settings(max_examples=200, deadline=None)
@given(asked=SPECS.flatmap(lambda spec: st.tuples(st.just(spec), requests(spec))))
def test_any_message_is_taken_or_refused_and_nothing_else(
    arena: InputArena, asked: tuple[VersionSpec, pb.InferRequest]
) -> None:
    spec, message = asked
    for tensor in message.inputs:
        if tensor.ref.epoch == 1:
            tensor.ref.epoch = arena.epoch
    try:
        request = read_request(message, spec, arena.view)
    except (InvalidArgument, FailedPrecondition):
        return
    for name, array in request.inputs.items():
        expected = spec.inputs[name]
        assert array.dtype == expected.dtype.numpy
        assert len(array.shape) == len(expected.shape)
    assert set(spec.inputs) >= set(request.inputs)
    assert request.rows <= max(spec.batch_rows_max, 1)
    assert [output.name for output in request.outputs] == [
        name for name in spec.outputs if name in {output.name for output in request.outputs}
    ]
