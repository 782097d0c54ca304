# SPDX-License-Identifier: Apache-2.0
"""What a plan's runtime is told to do, and what is left to us. Pure code."""

from collections.abc import Sequence
from dataclasses import dataclass

from thirdrail_engines.plans import Profile


@dataclass(frozen=True, slots=True)
class RuntimeChoices:
    """is_eager: kernels for exact shapes are compiled when a shape is set, else never.
    records_graphs: the runtime does. our_graphs_max: that we keep; 0 where the runtime does.
    shares_memory: contexts compute in memory that we lend them, else in their own."""

    is_eager: bool
    records_graphs: bool
    our_graphs_max: int
    shares_memory: bool


def choose(
    profiles: Sequence[Profile], *, prepares_at_run_time: bool, can_share: bool, graphs_max: int
) -> RuntimeChoices:
    """can_share: the runtime takes memory to compute in. graphs_max: 0 for no graphs at all.

    Graphs are recorded by the runtime or by us, never by both: a recording of a launch of a
    recording is no recording. Kernels for exact shapes are compiled only where there is one shape,
    whose time is the load's; with open sizes it would be the time of the first request of each.

    A graph holds the addresses that it was recorded with. Of ours we know that none is launched
    with memory that somebody else has; of the runtime's no documentation says so.
    """
    if not prepares_at_run_time:
        return RuntimeChoices(False, False, graphs_max, shares_memory=can_share)
    is_fixed = all(
        known.smallest == known.largest for profile in profiles for known in profile.inputs.values()
    )
    records = graphs_max > 0
    return RuntimeChoices(is_fixed, records, 0, shares_memory=can_share and not records)
