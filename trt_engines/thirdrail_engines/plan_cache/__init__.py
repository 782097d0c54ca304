# SPDX-License-Identifier: Apache-2.0
"""The plan cache: what was built once is read, checked and used again.

A cache is a folder. Nothing in it is the truth: whatever is missing, damaged or not trusted is
built anew.

    plans/KEY/plan, plans/KEY/manifest.json   an entry; the folder's mtime: its last use
    notes/KEY/NAME                            small things learnt about a plan on this machine
    timings/NAME                              what TensorRT measured of kernels, for later builds
    locks/KEY                                 held by who builds that plan
    locks/changing                            held while entries come and go
    work/                                     unfinished and removed things; who uses one holds it

All locks are flock's, which end with the process that holds them, however it ends.
"""

from thirdrail_engines.plan_cache.cache import PlanCache
from thirdrail_engines.plan_cache.digests import Digest, KnownDigests, digest_of
from thirdrail_engines.plan_cache.key import PlanKey, key_of
from thirdrail_engines.plan_cache.layout import default_folder
from thirdrail_engines.plan_cache.manifest import Manifest
from thirdrail_engines.plan_cache.opening import scratch_workspace
from thirdrail_engines.plan_cache.reading import Plan
from thirdrail_engines.plan_cache.trust import CacheFolderError

__all__ = [
    "CacheFolderError",
    "Digest",
    "KnownDigests",
    "Manifest",
    "Plan",
    "PlanCache",
    "PlanKey",
    "default_folder",
    "digest_of",
    "key_of",
    "scratch_workspace",
]
