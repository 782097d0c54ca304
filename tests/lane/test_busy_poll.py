# SPDX-License-Identifier: Apache-2.0
"""Looking for news before sleeping: how long, and that nothing is lost or late by it."""

import asyncio
import selectors
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thirdrail import Client
from thirdrail.lane.blocking_wire import BlockingWire
from thirdrail.lane.busy_poll import CLOSED_NS_MAX, CLOSED_NS_MIN, SHORTEST_NS, BusyWindow
from thirdrail.v1 import inference_pb2, lane_pb2
from thirdrail_server.busy_poll import BusySelector, new_loop
from thirdrail_server.config import ConfigError, ServerConfig, WorkerConfig

LONGEST_US = 100
LONGEST_NS = LONGEST_US * 1000
SOON_NS, LATE_NS = LONGEST_NS // 2, LONGEST_NS * 10


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thirdrail.lane.busy_poll._cores", lambda: 2)


def opened(times: int = 20) -> BusyWindow:
    window = BusyWindow(LONGEST_US)
    for _ in range(times):
        window.waited(LONGEST_NS, 0)
    return window


def test_it_begins_closed() -> None:
    assert BusyWindow(LONGEST_US).ns == 0


def test_it_opens_up_to_the_longest_while_news_come_soon() -> None:
    window = BusyWindow(LONGEST_US)
    seen = []
    for _ in range(6):
        window.waited(LONGEST_NS, 0)
        seen.append(window.ns)
    assert seen == [10_000, 20_000, 40_000, 80_000, 100_000, 100_000]


def test_it_grows_no_longer_than_news_take() -> None:
    window = BusyWindow(LONGEST_US)
    for _ in range(10):
        window.waited(15_000, 0)
    assert window.ns == 20_000


def test_it_closes_where_news_come_late() -> None:
    window = opened()
    for _ in range(5):
        window.waited(LATE_NS, 0)
    assert window.ns == 0


def test_one_late_answer_does_not_close_it() -> None:
    window = opened()
    window.waited(LATE_NS, 0)
    assert window.ns == LONGEST_NS // 2


@given(st.lists(st.integers(0, 10**9)), st.integers(0, 1000))
def test_it_keeps_its_bounds(waits: list[int], longest_us: int) -> None:
    window = BusyWindow(longest_us)
    for waited_ns in waits:
        window.waited(waited_ns, 0)
        longest_ns = longest_us * 1000
        assert window.ns == 0 or min(SHORTEST_NS, longest_ns) <= window.ns <= longest_ns


def test_a_longest_of_zero_never_looks() -> None:
    window = BusyWindow(0)
    window.waited(0, 0)
    window.waited(1, 0)
    assert window.ns == 0


def test_a_single_core_never_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thirdrail.lane.busy_poll._cores", lambda: 1)
    assert opened().ns == 0


class Core:
    """What else runs on the core, by how long it takes it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        self.step_ns = 1000
        monkeypatch.setattr("thirdrail.lane.busy_poll._after_others", self._after_others)

    def _after_others(self) -> int:
        self.now_ns += self.step_ns
        return self.now_ns

    def closes(self, window: BusyWindow) -> int:
        """Have it meet a crowd. Returns for how long it is closed, to 1 ms."""
        self.step_ns = 2_000_000
        assert not window.look(lambda timeout: [], self.now_ns)
        closed_ns = self.now_ns
        while not window.ns:
            self.now_ns += 1_000_000
            window.waited(SOON_NS, self.now_ns)
        return self.now_ns - closed_ns


def test_alone_on_its_core_it_looks_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    window, core = opened(), Core(monkeypatch)
    assert not window.look(lambda timeout: [], 0)
    assert (core.now_ns, window.ns) == (LONGEST_NS, LONGEST_NS)


def test_a_crowded_core_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    window, core = opened(), Core(monkeypatch)
    assert core.closes(window) == CLOSED_NS_MIN
    assert window.ns == SHORTEST_NS


def test_it_stays_closed_longer_each_time_until_the_crowd_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    window, core = opened(), Core(monkeypatch)
    closed = [core.closes(window) for _ in range(7)]
    assert closed[:3] == [CLOSED_NS_MIN, 2 * CLOSED_NS_MIN, 4 * CLOSED_NS_MIN]
    assert closed[-2:] == [CLOSED_NS_MAX, CLOSED_NS_MAX]
    core.now_ns += 2 * CLOSED_NS_MAX
    assert core.closes(window) == CLOSED_NS_MIN


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="0 us or more, got -1"):
        Client("unix:/nowhere", busy_poll_us=-1)
    with pytest.raises(ConfigError, match="busy_poll_us"):
        ServerConfig(repository=None, busy_poll_us=-1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="busy_poll_us"):
        WorkerConfig(busy_poll_us=-1)


def test_the_selector_finds_what_comes_while_it_looks_and_while_it_sleeps() -> None:
    window = opened()
    ours, theirs = socket.socketpair()
    with BusySelector(window) as selector, ours, theirs:
        selector.register(ours, selectors.EVENT_READ, "news")
        for delay_s in (0.0, 0.00002, 0.02):
            timer = threading.Timer(delay_s, theirs.send, [b"x"])
            timer.start()
            ready = selector.select(60)
            assert [(key.data, events) for key, events in ready] == [("news", selectors.EVENT_READ)]
            assert ours.recv(1) == b"x"
            timer.join()


@pytest.mark.parametrize("timeout_s", [0, 0.001, 0.05])
def test_the_selector_keeps_its_timeout(timeout_s: float) -> None:
    with BusySelector(opened()) as selector:
        started = time.monotonic()
        assert selector.select(timeout_s) == []
        assert time.monotonic() - started >= timeout_s


def test_a_quiet_loop_uses_no_core() -> None:
    async def idle() -> float:
        for _ in range(200):  # events as fast as they come: the window is open
            await asyncio.sleep(0)
        started = time.thread_time()  # other threads are other tests'
        for _ in range(20):
            await asyncio.sleep(0.02)
        return time.thread_time() - started

    with asyncio.Runner(loop_factory=lambda: new_loop(LONGEST_US)) as runner:
        assert runner.run(idle()) < 0.1


def test_zero_is_the_usual_loop() -> None:
    loop = new_loop(0)
    assert not isinstance(loop._selector, BusySelector)  # type: ignore[attr-defined]
    loop.close()


def answers(count: int, delay_s: float, sock: socket.socket) -> None:
    for number in range(count):
        sock.recv(10)
        if delay_s:
            time.sleep(delay_s)
        infer = inference_pb2.InferResponse(call=number + 1)
        sock.send(lane_pb2.LaneResponse(infer=infer).SerializeToString())


@pytest.mark.parametrize("delay_s", [0.0, 0.002])
def test_the_wire_gets_every_packet(delay_s: float) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire = BlockingWire(ours, busy_poll_us=LONGEST_US)
    answering = threading.Thread(target=answers, args=(50, delay_s, theirs))
    answering.start()
    for number in range(50):
        wire.send(b"go", None)
        received = wire.receive(1 << 16, None if number % 2 else 60 + time.monotonic())
        assert received is not None
        assert received[0].infer.call == number + 1
        assert wire.receive(1 << 16, 0.0) is None
    answering.join()
    wire.close()
    theirs.close()


def test_a_deadline_holds_while_it_looks() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire = BlockingWire(ours, busy_poll_us=LONGEST_US)
    started = time.monotonic()
    assert wire.receive(1 << 16, started + 0.02) is None
    assert 0.02 <= time.monotonic() - started < 60
    wire.close()
    theirs.close()
