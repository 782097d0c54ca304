# SPDX-License-Identifier: Apache-2.0
"""Services, the worker and the front are killed while tensors are handed over: whoever is left has
readable bytes or a clear error, and nothing stays behind.

A camera exports, a detector receives, a reader is handed it on.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.test_lives import is_gone
from support.holdings import Watch
from support.killable import until
from support.models import identity, write
from support.server import RunningServer, running_server
from support.services import Refused, Service

pytestmark = pytest.mark.slow  # services that were killed take long to start again

SIZE = 1 << 20  # elements: 4 MiB
BYTES = 4 * SIZE

Start = Callable[[], Service]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handover")
    write(folder, "identity", identity())
    return folder


@pytest.fixture(scope="module")
def lasting(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that no test kills."""
    with running_server(repository, tmp_path_factory.mktemp("lasting")) as running:
        yield running


@pytest.fixture
def mortal(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of the test's own."""
    with running_server(repository, tmp_path_factory.mktemp("mortal")) as running:
        yield running


@pytest.fixture
def watch(lasting: RunningServer) -> Iterator[Watch]:
    """Whatever happens, in the end the server holds what it held before."""
    watching = Watch(lasting)
    yield watching
    watching.until_back()
    watching.close()


@pytest.fixture
def start(lasting: RunningServer, watch: Watch) -> Iterator[Start]:
    with services(lasting) as start:
        yield start


@contextlib.contextmanager
def services(server: RunningServer) -> Iterator[Start]:
    """Starts services that are on the lane; kills them in the end."""
    started: list[Service] = []

    def start() -> Service:
        started.append(Service(server.url))
        assert started[-1].do("attach") == "lane"
        return started[-1]

    try:
        yield start
    finally:
        for service in started:
            service.kill()


def gone(watch: Watch, service: Service) -> bool:
    return all(each.pid != service.pid for each in watch.others())


@pytest.mark.parametrize("fill", ["fill", "fill_by_model"])
def test_the_exporter_dies_before_anybody_took_it(start: Start, watch: Watch, fill: str) -> None:
    camera, detector = start(), start()
    camera.do(fill, SIZE)
    token = camera.do("export")
    camera.kill()
    until(lambda: gone(watch, camera))
    with pytest.raises(Refused, match=r"FailedPrecondition.*who exported it has ended"):
        detector.do("receive", token)
    assert watch.of_pid(detector.pid).imports == 0


@pytest.mark.parametrize("fill", ["fill", "fill_by_model"])
def test_the_exporter_dies_and_the_importer_reads_on(start: Start, watch: Watch, fill: str) -> None:
    camera, detector = start(), start()
    camera.do(fill, SIZE)
    detector.do("receive", camera.do("export"))
    assert watch.of_pid(camera.pid).shared_bytes == BYTES
    camera.kill()
    until(lambda: gone(watch, camera))
    assert watch.of_pid(detector.pid).shared_bytes == BYTES  # who holds it pays now
    assert detector.do("read")
    assert detector.do("infer")
    detector.do("release")
    until(lambda: watch.of_pid(detector.pid).shared_bytes == 0)


def test_the_exporter_dies_while_it_exports(start: Start, watch: Watch) -> None:
    """At any moment of making the copy that a result needs."""
    detector = start()
    chance = random.Random(7)
    for _ in range(10):
        camera = start()
        camera.do("fill_by_model", 4 * SIZE)
        camera.begin("export")
        time.sleep(chance.uniform(0, 0.03))
        camera.kill()
        until(lambda camera=camera: gone(watch, camera))  # type: ignore[misc]
    assert watch.of_pid(detector.pid).shared_bytes == 0


def test_the_importer_dies_holding(start: Start, watch: Watch) -> None:
    camera, detector = start(), start()
    camera.do("fill", SIZE)
    detector.do("receive", camera.do("export"))
    assert watch.of_pid(camera.pid).exports == 1
    detector.kill()
    until(lambda: watch.of_pid(camera.pid).exports == 0)
    assert camera.do("infer_page")
    other = start()
    other.do("receive", camera.do("export"))  # it can be exported again
    assert other.do("read")


def test_the_importer_dies_while_it_imports(start: Start, watch: Watch) -> None:
    camera = start()
    camera.do("fill", SIZE)
    chance = random.Random(8)
    for _ in range(10):
        detector = start()
        detector.begin("receive", camera.do("export"))
        time.sleep(chance.uniform(0, 0.003))
        detector.kill()
        until(lambda detector=detector: gone(watch, detector))  # type: ignore[misc]
    # The tokens that nobody used up are still good: they are the camera's to end.
    assert watch.of_pid(camera.pid).exports <= 10
    assert watch.of_pid(camera.pid).shared_bytes == BYTES


def test_who_handed_it_on_dies(start: Start, watch: Watch) -> None:
    camera, detector, reader = start(), start(), start()
    camera.do("fill", SIZE)
    detector.do("receive", camera.do("export"))
    reader.do("receive", detector.do("hand_on"))
    camera.kill()
    detector.kill()
    until(lambda: gone(watch, camera) and gone(watch, detector))
    assert reader.do("read")
    assert reader.do("infer")
    assert watch.of_pid(reader.pid).shared_bytes == BYTES


def test_a_revoke_reaches_who_it_was_handed_on_to_past_the_dead(start: Start, watch: Watch) -> None:
    camera, detector, reader = start(), start(), start()
    camera.do("fill", SIZE)
    detector.do("receive", camera.do("export"))
    reader.do("receive", detector.do("hand_on"))
    detector.kill()
    until(lambda: gone(watch, detector))
    camera.do("revoke")
    with pytest.raises(Refused, match=r"FailedPrecondition.*revoked"):
        reader.do("infer")
    with pytest.raises(Refused, match=r"FailedPrecondition.*revoked"):
        reader.do("read")


def test_all_of_them_die_at_once(start: Start, watch: Watch) -> None:
    dying = [start() for _ in range(3)]
    camera, detector, reader = dying
    camera.do("fill", SIZE)
    detector.do("receive", camera.do("export"))
    reader.do("receive", detector.do("hand_on"))
    camera.do("export")
    for service in dying:
        os.kill(service.pid, signal.SIGKILL)
    until(lambda: not watch.others())


def mapped(service: Service) -> int:
    """Mappings of the server's memory in a process."""
    return Path(f"/proc/{service.pid}/maps").read_text().count("memfd:thirdrail")


def test_the_worker_dies_and_the_importer_reads_on(mortal: RunningServer) -> None:
    with services(mortal) as start:
        camera, detector = start(), start()
        camera.do("fill", SIZE)
        detector.do("receive", camera.do("export"))
        unused = camera.do("export")
        os.kill(mortal.worker_pid(), signal.SIGKILL)
        assert detector.do("read")
        until(lambda: is_served(detector))
        assert detector.do("infer")  # from memory of nobody's session: copied
        with pytest.raises(Refused, match=r"FailedPrecondition.*another server's"):
            detector.do("receive", unused)
        with pytest.raises(Refused, match=r"FailedPrecondition.*has ended"):
            camera.do("revoke")
        before = mapped(detector)
        detector.do("release")
        assert mapped(detector) == before - 1
        detector.do("receive", camera.do("export"))  # the same page, in a session anew
        assert detector.do("read")
        watch = Watch(mortal)
        assert watch.of_pid(camera.pid).shared_bytes == BYTES
        watch.close()


def is_served(service: Service) -> bool:
    with contextlib.suppress(Refused):
        return bool(service.do("attach") == "lane")
    return False


def test_the_front_dies_and_the_importer_reads_on(mortal: RunningServer) -> None:
    lane = mortal.socket.with_name("grpc.cpu.lane")
    worker = mortal.worker_pid()
    with services(mortal) as start:
        camera, detector = start(), start()
        camera.do("fill", SIZE)
        detector.do("receive", camera.do("export"))
        mortal.process.kill()
        mortal.process.wait()
        until(lambda: is_gone(worker))
        assert detector.do("read")
        with pytest.raises(Refused, match=r"Unavailable|Unreachable"):
            detector.do("infer")
        with pytest.raises(Refused, match="Unreachable"):
            camera.do("export")
        assert detector.do("read")
        before = mapped(detector)
        detector.do("release")
        assert mapped(detector) == before - 1
        assert not lane.exists()
        assert not mortal.socket.exists()
