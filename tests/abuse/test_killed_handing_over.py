# SPDX-License-Identifier: Apache-2.0
"""SIGKILL of services that hand a tensor on: it lives as long as somebody has it, and no longer."""

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from conftest import StartServer
from support.handing_over import serve_steps
from support.holdings import Watch
from support.killable import Killable, killable, until
from support.server import RunningServer

TENSOR_BYTES = 1 << 20

NewService = Callable[[], Killable]


@pytest.fixture
def service(server: RunningServer, watch: Watch) -> Iterator[NewService]:
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(killable(serve_steps, server.url))


def shared_bytes(watch: Watch) -> int:
    return watch.holdings().shared_bytes - watch.before.shared_bytes


@pytest.mark.parametrize("step", ["export_filled", "export_result"])
def test_the_exporter_dies_before_anybody_has_it(
    service: NewService, watch: Watch, step: str
) -> None:
    """Its token is good for nothing any more."""
    a, b = service(), service()
    token, _ = a.ask((step, 7.0))
    assert shared_bytes(watch) == TENSOR_BYTES
    a.kill()
    until(lambda: shared_bytes(watch) == 0)
    assert b.ask(("receive", token)) == "FailedPrecondition"


@pytest.mark.parametrize("step", ["export_filled", "export_result"])
def test_the_exporter_dies_and_the_importer_has_it_on(
    service: NewService, watch: Watch, step: str
) -> None:
    """To read, to infer with, and to hand on."""
    a, b, c = service(), service(), service()
    token, copies = a.ask((step, 7.0))
    assert copies == (step == "export_result")
    assert b.ask(("receive", token)) is True
    a.kill()
    until(lambda: len(watch.others()) <= 2)
    assert b.ask(("read", None)) == (7.0, True)
    assert b.ask(("infer", None)) == 7.0
    token, copies = b.ask(("export_received", None))
    assert copies == 0
    assert c.ask(("receive", token)) is True
    assert shared_bytes(watch) == TENSOR_BYTES, "one tensor, whoever has it"
    b.kill()
    assert c.ask(("read", None)) == (7.0, True)
    assert c.ask(("infer", None)) == 7.0
    assert c.ask(("release", None)) is True
    until(lambda: shared_bytes(watch) == 0)


def test_the_importer_dies(service: NewService, watch: Watch) -> None:
    a, b, c = service(), service(), service()
    token, _ = a.ask(("export_filled", 7.0))
    b.ask(("receive", token))
    b.kill()
    until(lambda: not any(each.imports for each in watch.others()))
    token, _ = a.ask(("export_filled", 8.0))
    assert c.ask(("receive", token)) is True
    assert c.ask(("read", None)) == (8.0, True)
    a.kill()
    c.kill()
    until(lambda: shared_bytes(watch) == 0)


def test_the_importer_dies_with_a_token_that_it_was_sent(service: NewService, watch: Watch) -> None:
    """Whoever has the token next may use it: it is bound to a user, not to a process."""
    a, b, c = service(), service(), service()
    token, _ = a.ask(("export_filled", 7.0))
    b.pipe.send(("receive", token))
    b.kill()
    answer = c.ask(("receive", token))
    assert answer in (True, "FailedPrecondition")
    if answer is True:
        assert c.ask(("read", None)) == (7.0, True)


def test_all_die_at_once(service: NewService, watch: Watch) -> None:
    services = [service() for _ in range(3)]
    for giver, taker in itertools.pairwise(services):
        token, _ = giver.ask(("export_filled", 7.0))
        taker.ask(("receive", token))
    for each in services:
        os.kill(each.pid, signal.SIGKILL)
    watch.until_back()


def test_a_revoked_tensor_dies_with_its_importer(service: NewService, watch: Watch) -> None:
    """Requests with it are refused; what is mapped stays as it is, and is nobody else's."""
    a, b = service(), service()
    token, _ = a.ask(("export_filled", 7.0))
    b.ask(("receive", token))
    assert a.ask(("revoke", None)) is True
    assert b.ask(("infer", None)) == "FailedPrecondition"
    a.kill()
    b.kill()
    until(lambda: shared_bytes(watch) == 0)


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "front"])
def test_the_server_dies(
    abused_repository: pytest.TempPathFactory, start_server: StartServer, who: str
) -> None:
    """What was received stays readable; everything else is refused in words."""
    server = start_server(abused_repository)
    with killable(serve_steps, server.url) as a, killable(serve_steps, server.url) as b:
        first, _ = a.ask(("export_filled", 7.0))
        second, _ = a.ask(("export_filled", 8.0))
        b.ask(("receive", first))
        worker = psutil.Process(server.worker_pid())
        os.kill(worker.pid if who == "worker" else server.pid, signal.SIGKILL)
        # Without its front a worker ends by itself; until then it still hands over.
        until(lambda: has_ended(worker))
        # The next worker may be there by now, and is sent a copy.
        assert b.ask(("infer", None)) in ("Unavailable", "Unreachable", 7.0)
        assert b.ask(("read", None)) == (7.0, True)
        assert b.ask(("receive", second)) in ("Unavailable", "Unreachable", "FailedPrecondition")
        assert a.ask(("revoke", None)) == "FailedPrecondition"
        assert b.ask(("release", None)) is True
