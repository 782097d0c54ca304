# SPDX-License-Identifier: Apache-2.0
"""Thirdrail's client: call models on this host over gRPC.

    import thirdrail

    with thirdrail.Client() as client:
        result = client.infer("my_model", {"x": array})
        print(result["y"], result.timing.compute_ns)

`thirdrail.aio.AsyncClient` is the same for asyncio, and `aio.AsyncDevice` for `Device`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from thirdrail._version import __version__

if TYPE_CHECKING:
    from thirdrail import aio, errors
    from thirdrail.channels import TlsOptions
    from thirdrail.client import Client
    from thirdrail.device.arrays import DeviceArray
    from thirdrail.device.device import Device
    from thirdrail.errors import CallerError, NotNow, ServerFault, ThirdrailError
    from thirdrail.failures import Unreachable
    from thirdrail.models import (
        EngineReport,
        LoadProgress,
        ModelChange,
        ModelDescription,
        ModelStatus,
        OutputProof,
    )
    from thirdrail.requests import Result
    from thirdrail.stream import Stream
    from thirdrail.tensors import TensorSpec

__all__ = [
    "CallerError",
    "Client",
    "Device",
    "DeviceArray",
    "EngineReport",
    "LoadProgress",
    "ModelChange",
    "ModelDescription",
    "ModelStatus",
    "NotNow",
    "OutputProof",
    "Result",
    "ServerFault",
    "Stream",
    "TensorSpec",
    "ThirdrailError",
    "TlsOptions",
    "Unreachable",
    "__version__",
    "aio",
    "errors",
]

# Loaded when first used: a worker process shares this package's tensor types and has no use for
# the client, whose gRPC takes 17 MB and a fifth of a second.
_HOMES = {
    "CallerError": "errors",
    "Client": "client",
    "Device": "device.device",
    "DeviceArray": "device.arrays",
    "EngineReport": "models",
    "LoadProgress": "models",
    "ModelChange": "models",
    "ModelDescription": "models",
    "ModelStatus": "models",
    "NotNow": "errors",
    "OutputProof": "models",
    "Result": "requests",
    "ServerFault": "errors",
    "Stream": "stream",
    "TensorSpec": "tensors",
    "ThirdrailError": "errors",
    "TlsOptions": "channels",
    "Unreachable": "failures",
}


def __getattr__(name: str) -> Any:
    if name in ("aio", "errors"):
        return importlib.import_module(f"thirdrail.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'thirdrail' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"thirdrail.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
