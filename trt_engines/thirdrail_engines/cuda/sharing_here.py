# SPDX-License-Identifier: Apache-2.0
"""How the devices of this host could share memory with its processes, in words. Makes no context.

Not yet run on a GPU.
"""

import functools

from thirdrail_engines.cuda.sharing import Peers, choose_sharing
from thirdrail_engines.engine import DeviceLost, EngineError
from thirdrail_engines.host import cuda_devices, why_no_cuda_device
from thirdrail_engines.plans import BuildError


@functools.cache
def sharing_here() -> str:
    """For each device what `choose_sharing` says of two processes of one user; looked up once."""
    devices = cuda_devices()
    if not devices:
        return why_no_cuda_device()
    from thirdrail_engines.cuda.driver import device_capabilities

    try:
        found = {facts: device_capabilities(facts.uuid) for facts in devices}
    except (BuildError, EngineError, DeviceLost) as error:
        return str(error)
    return ". ".join(
        f"{facts.uuid} ({facts.name}): {choose_sharing(facts, offered, Peers())}"
        for facts, offered in found.items()
    )
