# SPDX-License-Identifier: Apache-2.0
"""What checks of honoured fields are made with, and the table that they add themselves to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format

from thirdrail_engines.compile_options import CompileOptions, OnFailure
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import compile_options
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.options import ModelOptions, model_options

QUEUE_REQUESTS_MAX = 99
INPUT = "input { name: 'x' data_type: TYPE_FP32 dims: [3] }"

Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def honours(path: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[path] = check
        return check

    return register


def parse(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig(name="m"))


def options(text: str, folder: Path = Path("/nowhere")) -> ModelOptions:
    return model_options(parse(text), folder, queue_requests_max=QUEUE_REQUESTS_MAX)


def compiled(text: str) -> CompileOptions:
    return compile_options(parse(text), on_failure=OnFailure.FALLBACK)


def refusal(text: str, folder: Path = Path("/nowhere")) -> str:
    with pytest.raises(RepositoryError) as caught:
        options(text, folder)
    start = "model 'm': "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)
