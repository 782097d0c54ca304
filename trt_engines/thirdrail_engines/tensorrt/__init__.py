# SPDX-License-Identifier: Apache-2.0
"""TensorRT, from either of the two packages that offer it: `tensorrt` and `tensorrt_rtx`.

Nothing here imports them before it is asked to. docs/tensorrt.md says what has been run where.
"""

from thirdrail_engines.tensorrt.api import capability_names, installed_builders
from thirdrail_engines.tensorrt.capabilities import check_capabilities
from thirdrail_engines.tensorrt.describe import describe_plan
from thirdrail_engines.tensorrt.plan_header import PlanHeader, read_header

__all__ = [
    "PlanHeader",
    "capability_names",
    "check_capabilities",
    "describe_plan",
    "installed_builders",
    "read_header",
]
