# SPDX-License-Identifier: Apache-2.0
"""Builds: a plan is made in a process of its own, which may crash, hang or grow as it likes.

So are the results of the reference that a plan is proven against."""

from thirdrail_engines.builds.limits import BuildLimits
from thirdrail_engines.builds.result import Built, BuiltPlan, PlanTensor
from thirdrail_engines.builds.run import run_build, run_reference

__all__ = ["BuildLimits", "Built", "BuiltPlan", "PlanTensor", "run_build", "run_reference"]
