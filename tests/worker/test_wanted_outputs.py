# SPDX-License-Identifier: Apache-2.0
"""Which outputs `read_request` says are wanted: in which order, in which form."""

from typing import Any

import pytest

from support.specs import INDEX, X, a_tensor, spec_of
from thirdrail.errors import InvalidArgument
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import tensor_pb2
from thirdrail_server.worker.input_arena import InputArena
from thirdrail_server.worker.requests import read_request
from thirdrail_server.worker.wanted_outputs import WantedOutput

RAW = a_tensor()
VALUES = a_tensor(values=tensor_pb2.Values(floats=range(6)))
NO_MEMORY = InputArena(0)


def wanted(
    *asked: pb.RequestedOutput, inputs: tuple[tensor_pb2.Tensor, ...] = (RAW,)
) -> list[WantedOutput]:
    spec = spec_of(*(X, INDEX)[: len(inputs)])
    message = pb.InferRequest(inputs=inputs, outputs=asked)
    return list(read_request(message, spec, NO_MEMORY.view).outputs)


@pytest.mark.parametrize(
    ("inputs", "as_values"),
    [
        ((RAW,), False),
        ((VALUES,), True),
        ((VALUES, a_tensor("index", "INT64", (1,))), False),
    ],
    ids=["raw", "values", "both"],
)
def test_without_a_wish_all_outputs_come_in_the_form_of_the_inputs(
    inputs: tuple[tensor_pb2.Tensor, ...], as_values: bool
) -> None:
    assert wanted(inputs=inputs) == [
        WantedOutput(name, as_values, 0) for name in ("y", "z", "words")
    ]


def test_outputs_come_in_the_models_order_in_the_form_asked_for() -> None:
    z = pb.RequestedOutput(name="z", form=pb.OUTPUT_FORM_VALUES)
    y = pb.RequestedOutput(name="y", form=pb.OUTPUT_FORM_RAW, class_count=2)
    for inputs in ((RAW,), (VALUES,)):
        assert wanted(z, y, inputs=inputs) == [
            WantedOutput("y", False, 2),
            WantedOutput("z", True, 0),
        ]
        as_given = WantedOutput("words", inputs == (VALUES,), 0)
        assert wanted(pb.RequestedOutput(name="words"), inputs=inputs) == [as_given]


def test_a_form_from_a_newer_client_is_as_if_there_were_none() -> None:
    newer = pb.RequestedOutput(name="y", form=7)  # type: ignore[arg-type]
    assert wanted(newer, inputs=(VALUES,)) == [WantedOutput("y", True, 0)]


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ([{"name": "Y"}], "unexpected inference output 'Y' for model 'm'"),
        ([{"name": "y"}, {"name": "y"}], "output 'y' already exists in request"),
        (
            [{"name": "words", "class_count": 1}],
            "class result not available for output due to unsupported type 'BYTES'",
        ),
    ],
)
def test_outputs_that_the_model_does_not_have(asked: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        wanted(*(pb.RequestedOutput(**output) for output in asked))
    assert caught.value.message == text
