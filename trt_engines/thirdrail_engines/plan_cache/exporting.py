# SPDX-License-Identifier: Apache-2.0
"""Copying plans to another cache folder, for machines that do not build."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from thirdrail_engines.plan_cache.inventory import fault_of, read_verified
from thirdrail_engines.plan_cache.layout import Layout
from thirdrail_engines.plan_cache.opening import reason_of
from thirdrail_engines.plan_cache.reading import Damaged
from thirdrail_engines.plan_cache.saving import save_entry
from thirdrail_engines.plan_cache.store import Store
from thirdrail_engines.plan_cache.trust import CacheFolderError, check_folder

_NO_LIMIT = 1 << 62


@dataclass(slots=True)
class Exported:
    """there: those that the destination had already, whole. damaged: what is wrong with each."""

    copied: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def export_plans(layout: Layout, digests: Sequence[str], destination: Path) -> Exported:
    """Copy plans with their manifests, verified, and without notes, which are about one machine.

    Others may read what is made. Raises CacheFolderError, LockTimeout, OSError.
    """
    target = Layout(destination)
    destination.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_folder(destination)
    if not target.plans.is_dir() and any(destination.iterdir()):
        raise CacheFolderError(
            f"{destination} holds other things and is no plan cache: name one, an empty folder, or "
            "one that is to be made"
        )
    for folder in target.folders:
        folder.mkdir(mode=0o755, exist_ok=True)
        check_folder(folder)
    store = Store(target, _NO_LIMIT)
    done = Exported()
    for digest in digests:
        if not fault_of(target, digest):
            done.there.append(digest)
            continue
        try:
            plan = read_verified(layout, digest)
        except Damaged as error:
            done.damaged[digest] = str(error)
        except FileNotFoundError as error:  # evicted since it was listed
            done.damaged[digest] = reason_of(error)
        else:
            os.close(save_entry(store, plan))
            done.copied.append(digest)
    return done
