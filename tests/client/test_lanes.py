# SPDX-License-Identifier: Apache-2.0
"""Which worker a model's calls go to."""

from dataclasses import dataclass

from thirdrail.lanes import PLACE_NS_MAX, Lanes
from thirdrail.transport import Transport, TransportName

ALL = ("cuda:GPU-a", "cuda:GPU-b", "cpu")


@dataclass
class Way:
    worker: str
    workers: tuple[str, ...] = ()
    calls_in_flight: int = 0
    name: TransportName = "grpc-unix"
    has_left: bool = False

    @property
    def transport(self) -> Transport:
        return Transport(self.name, self.worker, "")

    def leave(self) -> None:
        self.has_left = True


def attached() -> Lanes[Way]:
    lanes = Lanes(Way)
    assert not lanes.are_several
    lanes.home.workers = ALL
    return lanes


def test_one_worker_needs_no_choice() -> None:
    lanes = Lanes(Way)
    lanes.home.workers = ("cpu",)
    assert not lanes.are_several
    assert lanes.to(()) == [lanes.home]


def test_the_first_worker_is_the_one_that_nobody_named() -> None:
    lanes = attached()
    assert lanes.are_several
    assert lanes.to(ALL[:1]) == [lanes.home]
    (way,) = lanes.to(("cpu",))
    assert way.worker == "cpu"
    assert lanes.to(("cpu",))[0] is way, "one way to each"


def test_the_least_busy_worker_is_taken() -> None:
    lanes = attached()
    ways = {each.worker: each for each in lanes.to(ALL)}
    lanes.home.calls_in_flight, ways["cpu"].calls_in_flight = 2, 1
    assert [each.worker for each in lanes.to(ALL)] == ["cuda:GPU-b", "cpu", ""]


def test_places_are_believed_for_a_while() -> None:
    lanes = attached()
    assert lanes.place("m", 5) is None
    lanes.found("m", ["cpu"], 5)
    assert lanes.place("m", 5 + PLACE_NS_MAX) == ("cpu",)
    assert lanes.place("m", 6 + PLACE_NS_MAX) is None
    assert lanes.known("m") == ("cpu",)
    assert lanes.forget("m")
    assert not lanes.forget("m")
    assert lanes.known("m") == ()


def test_what_calls_travel_on_is_the_lane_if_one_is_attached() -> None:
    lanes = attached()
    (way,) = lanes.to(("cpu",))
    assert lanes.transport.address == ""
    way.name = "lane"
    assert lanes.transport.address == "cpu"
    lanes.leave()
    assert lanes.home.has_left
    assert way.has_left
