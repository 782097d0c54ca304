# SPDX-License-Identifier: Apache-2.0
"""`PlanCache`: what those who compile and load see of the cache."""

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from thirdrail_engines.plan_cache import notes
from thirdrail_engines.plan_cache.holds import Holds
from thirdrail_engines.plan_cache.key import PlanKey
from thirdrail_engines.plan_cache.layout import Layout, check_note_name
from thirdrail_engines.plan_cache.locks import LockTimeout, lock_to_read, locked_file, open_folder
from thirdrail_engines.plan_cache.manifest import MANIFEST_FORMAT, Manifest
from thirdrail_engines.plan_cache.opening import open_layer, open_main, open_scratch, reason_of
from thirdrail_engines.plan_cache.reading import (
    Damaged,
    Plan,
    manifests_in,
    read_and_hash,
    read_entry,
)
from thirdrail_engines.plan_cache.saving import save_entry, write_synced
from thirdrail_engines.plan_cache.store import NoRoom, Store
from thirdrail_engines.plan_cache.timings import Timings
from thirdrail_engines.plan_cache.trust import CacheFolderError
from thirdrail_engines.plan_cache.workspaces import sweep, workspace_in
from thirdrail_engines.plans import BuildError, BuildFault, TellProgress

log = logging.getLogger(__name__)

WAITING = "waiting for another build"  # the phase that is told
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class PlanCache:
    """Plans by their key. Safe to use from several threads, and with several servers at once.

    A plan that was handed out is in use, and not evicted by anybody, until `release`, `close` or
    the end of this process.
    """

    def __init__(self, folder: Path, bytes_max: int, read_only: Sequence[Path] = ()) -> None:
        """folder: made if it is missing. One that cannot be written to is only read.

        bytes_max: of plans, manifests and notes; what is being built counts when it is saved.
        read_only: other caches, asked in this order for what `folder` does not have.
        Raises CacheFolderError for folders that others can write to or that belong to others.
        """
        main = open_main(folder)
        self._layers = tuple(map(open_layer, read_only))
        self._main = Layout(folder)
        self._store = Store(main, bytes_max) if main else None
        self.keeps_plans = main is not None  # False where the folder can only be read
        self._scratch = main or open_scratch()
        self._holds = Holds()
        self._warned: dict[Path, str] = {}  # of what is damaged, until it is whole again
        self.timings = Timings([each.timings for each in (self._main, *self._layers)], main)
        sweep(self._scratch.work)

    def has(self, key: PlanKey) -> bool:
        """Whether a plan lies there, verified or not."""
        layouts = (self._main, *self._layers)
        return any((layout.plans / key.digest).is_dir() for layout in layouts)

    def get(self, key: PlanKey) -> Plan | None:
        """The plan, verified, and from now on in use. None: it has to be built.

        What is damaged or not to be trusted is warned about, and is as good as absent.
        """
        for layout in (self._main, *self._layers):
            path = layout.plans / key.digest
            try:
                plan = self._read(path, key, is_main=layout is self._main)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except Damaged as error:
                self._warn_once(path, f"is not used: {error}")
            except OSError as error:
                self._warn_once(path, f"cannot be read: {reason_of(error)}")
            else:
                self._warned.pop(path, None)
                return plan
        return None

    def manifests(self) -> Iterator[Manifest]:
        """Of the plans that are there, verified or not; what cannot be read is passed over."""
        return manifests_in(layout.plans for layout in (self._main, *self._layers))

    def release(self, key: PlanKey) -> None:
        """The plan is no longer used here: once for each `get` and `put` that returned it."""
        self._holds.drop(key.digest)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A private folder to build in, where `put` takes plans from without copying them.

        It is removed at the end, and by the next user of the cache if this process dies before.
        Raises BuildError when there is no space for it.
        """
        sweep(self._scratch.work)
        with contextlib.ExitStack() as stack:
            with self._disk_errors("a folder to build in"):
                self._remake_folders()
                path = stack.enter_context(workspace_in(self._scratch.work))
            yield path

    @contextlib.contextmanager
    def building(
        self, key: PlanKey, cancelled: threading.Event, tell: TellProgress
    ) -> Iterator[None]:
        """Nobody else builds this plan meanwhile, in no thread and no process on this cache.

        Who had to wait should `get` again. Raises BuildError CANCELLED when `cancelled` is set
        while waiting, OUT_OF_DISK when the lock's file cannot be made.
        """

        def waiting(holder: str) -> None:
            log.info("process %s builds plan %.12s: waiting for it", holder, key.digest)
            tell(WAITING, 0, 0)

        with contextlib.ExitStack() as stack:
            with self._disk_errors("a lock"):
                self._remake_folders()
                lock = locked_file(
                    self._scratch.locks / key.digest, cancelled=cancelled, waiting=waiting
                )
                is_ours = stack.enter_context(lock)
            if not is_ours:
                raise BuildError(
                    BuildFault.CANCELLED,
                    "cancelled while another build of this plan was waited for",
                )
            yield

    def put(self, key: PlanKey, plan_file: Path, manifest: Manifest) -> Plan:
        """Save a plan that was built, and hand it over, in use. `plan_file` is moved away.

        The cache's own fields of the manifest are filled in. A plan that cannot be kept, because
        the cache is only read or full of plans in use, or the disk is full, is handed over with a
        warning. Raises BuildError MISSING when the build left no plan there.
        """
        plan = _finished(key, plan_file, manifest)
        if self._store is None:
            log.warning("plan %.12s is not kept: the cache is only read", key.digest)
            return plan
        try:
            self._holds.keep(key.digest, save_entry(self._store, plan, plan_file))
            self._warned.pop(self._main.plans / key.digest, None)
        except (NoRoom, LockTimeout) as error:
            log.warning("plan %.12s is not kept: %s", key.digest, error)
        except OSError as error:
            reason = reason_of(error)
            if error.errno in _FULL:
                reason += f" in {self._main.root}. Free some, or lower the cache's limit"
            log.warning("plan %.12s is not kept: %s", key.digest, reason)
        return plan

    def note(self, plan: Plan, name: str, data: bytes) -> None:
        """Remember something about this plan, in place of what was remembered under the name.

        A note that cannot be kept is warned about. Raises ValueError for a name that is none.
        """
        check_note_name(name)
        if self._store is None:
            return
        try:
            self._save_note(self._store, plan, name, data)
        except (NoRoom, LockTimeout) as error:
            log.warning("note '%s' about plan %.12s: %s", name, plan.key.digest, error)
        except OSError as error:
            log.warning("note '%s' about plan %.12s: %s", name, plan.key.digest, reason_of(error))

    def notes(self, plan: Plan, name: str) -> bytes | None:
        """What was remembered about exactly these bytes; None if nothing, or damaged."""
        check_note_name(name)
        for layout in (self._main, *self._layers):
            folder = layout.notes / plan.key.digest
            try:
                found = notes.read_note(folder, name, plan.manifest.plan_sha256)
            except notes.NoteDamaged as error:
                log.warning("the note in %s is not used: %s", folder, error)
            except OSError as error:
                log.warning("the note in %s cannot be read: %s", folder, reason_of(error))
            else:
                if found is not None:
                    return found
        return None

    def close(self) -> None:
        """Nothing is in use here any more."""
        self._holds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remake_folders(self) -> None:
        """Somebody may have emptied the disk since the cache was opened. Raises as that does."""
        wanted = self._scratch.folders if self._store else (self._scratch.locks, self._scratch.work)
        if not all(each.is_dir() for each in wanted):
            if self._store is None:
                open_scratch()
            else:
                open_main(self._scratch.root)

    def _warn_once(self, path: Path, text: str) -> None:
        """A plan is looked for several times before it is built again."""
        if self._warned.get(path) != text:
            self._warned[path] = text
            log.warning("the plan in %s %s", path, text)

    def _read(self, path: Path, key: PlanKey, *, is_main: bool) -> Plan:
        fd = open_folder(path)
        try:
            if is_main:
                lock_to_read(fd)
            plan = read_entry(key, fd)
            if is_main and self._store is not None:
                with contextlib.suppress(OSError):  # root's entry in our folder
                    os.utime(fd, ns=(time.time_ns(),) * 2)
        except BaseException:
            os.close(fd)
            raise
        if is_main:
            self._holds.keep(key.digest, fd)
        else:
            os.close(fd)
        return plan

    def _save_note(self, store: Store, plan: Plan, name: str, data: bytes) -> None:
        if len(data) > notes.NOTE_BYTES_MAX:
            raise NoRoom(f"{len(data)} bytes are too many, the limit is {notes.NOTE_BYTES_MAX}")
        with workspace_in(store.layout.work) as folder:
            staged = folder / name
            write_synced(staged, notes.encoded(plan.manifest.plan_sha256, data))
            with store.changing():
                store.make_room(staged.stat().st_size)
                notes.place_note(store.layout.notes / plan.key.digest, name, staged)

    @contextlib.contextmanager
    def _disk_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except CacheFolderError as error:
            raise BuildError(BuildFault.OUT_OF_DISK, str(error)) from None
        except OSError as error:
            where = self._scratch.root
            if error.errno in _FULL:
                raise BuildError(
                    BuildFault.OUT_OF_DISK,
                    f"there is no space for {what} in {where}: {reason_of(error)}. "
                    "Free some, or lower the cache's limit",
                ) from None
            # A disk that broke or can only be read now is no better than a full one.
            raise BuildError(
                BuildFault.OUT_OF_DISK, f"cannot make {what} in {where}: {reason_of(error)}"
            ) from None


def _finished(key: PlanKey, plan_file: Path, manifest: Manifest) -> Plan:
    """Read what a build left. Raises BuildError MISSING."""
    try:
        fd = os.open(plan_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            data, digest = read_and_hash(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        text = f"the build left no plan at {plan_file}: {reason_of(error)}"
        raise BuildError(BuildFault.MISSING, text) from None
    except Damaged as error:
        raise BuildError(BuildFault.MISSING, f"{plan_file}: {error}") from None
    if not size:
        raise BuildError(BuildFault.MISSING, f"the build left an empty plan at {plan_file}")
    complete = replace(
        manifest,
        format=MANIFEST_FORMAT,
        key=key.digest,
        key_parts=dict(key.parts),
        plan_bytes=size,
        plan_sha256=digest,
    )
    return Plan(key, complete, data)
