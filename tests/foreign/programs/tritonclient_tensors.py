# SPDX-License-Identifier: Apache-2.0
"""What tritonclient's programs share: its input objects from arrays, and what a call was refused
with."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from foreign.programs.checks import raised

COUNTED_S = 0.5


def inputs(**arrays: Any) -> list[triton.InferInput]:
    made = []
    for name, array in arrays.items():
        made.append(triton.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        made[-1].set_data_from_numpy(array)
    return made


def ones(rows: int = 1) -> list[triton.InferInput]:
    """The input of the model plus_one."""
    return inputs(a=np.ones((rows, 4), np.float32))


def turns(count: int) -> list[triton.InferInput]:
    """Inputs of the models slow and narrow, about 30 us a turn."""
    return inputs(x=np.zeros(1, np.float32), turns=np.array(count, np.int64))


def executions(client: triton.InferenceServerClient, model: str) -> int:
    """How often the model has run. An answer may come a moment before its run is counted."""
    time.sleep(COUNTED_S)
    return int(client.get_inference_statistics(model).model_stats[0].execution_count)


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    """The status, such as "NOT_FOUND", and the text that the call fails with."""
    error = raised(InferenceServerException, call)
    return str(error.status()).removeprefix("StatusCode."), str(error.message())


def assert_refused(call: Callable[[], Any], status: str, *texts: str) -> None:
    found, message = refusal(call)
    assert found == status, f"{found} {message}"
    for text in texts:
        assert text in message, message
