# SPDX-License-Identifier: Apache-2.0
"""`client.empty`: every way to name a type, and what no array has."""

from typing import Any

import numpy as np
import pytest

from support.server import RunningServer
from thirdrail import Client
from thirdrail.dtypes import DTYPES, DType
from thirdrail.errors import InvalidArgument

LARGE = 1 << 20  # elements: more than a packet carries


@pytest.fixture(params=["lane", "grpc"])
def client(request: pytest.FixtureRequest, server: RunningServer) -> Any:
    with Client(server.url, transport=request.param) as client:
        yield client


@pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)
@pytest.mark.parametrize("shape", [(), 3, (2, 0), (2, LARGE), (np.int64(2), 3)], ids=str)
def test_types_go_by_our_names(client: Client, row: DType, shape: Any) -> None:
    array = client.empty(shape, row.name)
    assert array.dtype == row.numpy
    assert array.shape == np.empty(shape, np.uint8).shape


def test_types_go_by_numpys_names(client: Client) -> None:
    assert client.empty(2, "float16").dtype == np.float16
    assert client.empty(2, int).dtype == np.int64


@pytest.mark.parametrize(
    ("shape", "dtype", "text"),
    [
        (2, "FP31", "'FP31' is no element type, expected numpy's or one of BOOL, UINT8"),
        (-1, "FP32", r"a shape has numbers from 0, got \[-1\]"),
        (2.5, "FP32", r"a shape is an int or a sequence of them, got 2\.5"),
        ((2, 1.5), "FP32", r"a shape has numbers from 0, got \[2, 1.5\]"),
    ],
)
def test_what_no_array_has_is_refused(client: Client, shape: Any, dtype: Any, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        client.empty(shape, dtype)
