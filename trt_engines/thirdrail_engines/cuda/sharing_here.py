# SPDX-License-Identifier: Apache-2.0
"""How the devices of this host share memory with its processes. Makes no context.

Not yet run on a GPU.
"""

import functools
from collections.abc import Mapping

from thirdrail_engines.cuda.sharing import Peers, Sharing, choose_sharing
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.host import cuda_devices, why_no_cuda_device
from thirdrail_engines.plans import BuildError


@functools.cache
def sharing_here() -> tuple[Mapping[str, Sharing], str]:
    """By UUID what `choose_sharing` says of two processes of one user; why there is nothing to say,
    where there is no device. Looked up once."""
    devices = cuda_devices()
    if not devices:
        return {}, why_no_cuda_device()
    from thirdrail_engines.cuda.driver import device_capabilities

    try:
        found = {facts: device_capabilities(facts.uuid) for facts in devices}
    except (BuildError, EngineError, DeviceLost) as error:
        return {}, str(error)
    return {
        facts.uuid: choose_sharing(facts, offered, Peers()) for facts, offered in found.items()
    }, ""
