# SPDX-License-Identifier: Apache-2.0
"""Thirdrail's client: call models on this host over gRPC.

    import thirdrail

    with thirdrail.Client() as client:
        result = client.infer("my_model", {"x": array})
        print(result["y"], result.timing.compute_ns)

`thirdrail.aio.AsyncClient` is the same for asyncio.
"""

from thirdrail import aio
from thirdrail._version import __version__
from thirdrail.channels import TlsOptions
from thirdrail.client import Client
from thirdrail.errors import CallerError, NotNow, ServerFault, ThirdrailError
from thirdrail.failures import Unreachable
from thirdrail.models import LoadProgress, ModelChange, ModelDescription, ModelStatus
from thirdrail.requests import Result
from thirdrail.stream import Stream
from thirdrail.tensors import TensorSpec

__all__ = [
    "CallerError",
    "Client",
    "LoadProgress",
    "ModelChange",
    "ModelDescription",
    "ModelStatus",
    "NotNow",
    "Result",
    "ServerFault",
    "Stream",
    "TensorSpec",
    "ThirdrailError",
    "TlsOptions",
    "Unreachable",
    "__version__",
    "aio",
]
