# SPDX-License-Identifier: Apache-2.0
"""The test vectors of docs/lane.md: they mean what they say, and a real worker answers so."""

from collections.abc import Iterator

import numpy as np
import pytest

from support.lane_peer import LanePeer, Response
from support.models import double, write
from support.vectors import DOCUMENT, Message, Vector, rewritten, vectors_in
from support.worker import running_worker
from thirdrail.v1 import inference_pb2 as pb
from thirdrail.v1 import lane_pb2

MARKDOWN = DOCUMENT.read_text()
VECTORS = vectors_in(MARKDOWN)

X = np.arange(8192, dtype=np.float32)

# What is sent, and what comes back, in the order of one session. None: nothing.
SESSION: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("hello", ("attached",)),
    ("infer, inline", ("response, inline",)),
    ("grow", ("chunk of the input arena, with its descriptor",)),
    (
        "infer, by reference",
        ("chunk of the output arena, with its descriptor", "response, by reference"),
    ),
    ("infer, with a result as its input", ("response, in another slot",)),
    ("infer, of a model that is not there", ("response, failed",)),
    ("cancel", ()),
    ("ping, with bytes to copy", ("pong, with the copy",)),
    ("releases, beside a ping", ("pong",)),
    ("grow by too much", ("grow refused",)),
    ("grow for a tensor alone", ("chunk for a tensor alone, with its descriptor",)),
    ("export", ("exported",)),
)


@pytest.mark.parametrize("vector", VECTORS.values(), ids=lambda vector: vector.name)
def test_a_vector_means_what_it_says(vector: Vector) -> None:
    assert vector.decoded() == vector.message
    assert vector.decoded().SerializeToString(deterministic=True) == vector.packet


def test_the_packets_are_made_of_their_meanings() -> None:
    assert rewritten(MARKDOWN) == MARKDOWN, "run `python -m support.vectors` in tests/"


def test_no_vector_is_overlooked() -> None:
    starts = [line for line in MARKDOWN.splitlines() if line.startswith(("> ", "< "))]
    assert [line[2:] for line in starts] == list(VECTORS)


@pytest.mark.parametrize("kind", [lane_pb2.LaneRequest, lane_pb2.LaneResponse])
def test_there_is_one_for_every_message(kind: type[Message]) -> None:
    shown = {vector.decoded().WhichOneof("message") for vector in VECTORS.values()}
    assert {field.name for field in kind.DESCRIPTOR.oneofs_by_name["message"].fields} <= shown


def test_the_reasons_have_their_numbers() -> None:
    table = MARKDOWN.split("| Reason | | Whose turn |\n")[1].split("\n\n")[0].splitlines()[1:]
    cells = [[cell.split(", ") for cell in line.strip("| ").split(" | ")] for line in table]
    documented = {
        name: int(number)
        for names, numbers, _ in cells
        for name, number in zip(names, numbers, strict=True)
    }
    reasons = {name.removeprefix("REASON_"): number for name, number in pb.Reason.items()}
    assert documented == {name: number for name, number in reasons.items() if number}


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[LanePeer]]:
    """Two lanes of a fresh worker, whose first one, the front's, is attached."""
    repository = tmp_path_factory.mktemp("repository")
    write(repository, "double", double())
    with running_worker(lanes=3) as worker:
        worker.load(repository)
        worker.attach()
        yield [LanePeer(sock) for sock in worker.sockets]


def test_a_real_worker_answers_so(peers: list[LanePeer]) -> None:
    peer, importer = peers
    for sent, answers in SESSION:
        peer.sock.send(VECTORS[sent].packet)
        for answer in answers:
            received = expect(peer, answer)
    importer.attach()
    importing = lane_pb2.LaneRequest.FromString(VECTORS["import"].packet)
    importing.import_tensor.token = received.exported.token
    importer.send(importing)
    expect(importer, "imported, with its descriptor")
    peer.sock.send(VECTORS["drop"].packet)
    peer.sock.send(VECTORS["revoke"].packet)
    expect(peer, "revoked, to the exporter")
    expect(importer, "revoked, to an importer")
    peer.sock.send(VECTORS["hello"].packet)
    expect(peer, "goodbye")
    peer.sock.send(VECTORS["close"].packet)
    with pytest.raises(EOFError):
        peer.receive()


def expect(peer: LanePeer, vector: str) -> Response:
    received = peer.receive()
    assert comparable(received) == comparable(VECTORS[vector].decoded()), vector
    look_into(peer, received)
    return received


def comparable(message: Message) -> Response:
    """Without what differs from run to run."""
    copy = Response.FromString(message.SerializeToString())
    if copy.HasField("infer"):
        for name in ("queue_ns", "input_copy_ns", "compute_ns", "output_copy_ns"):
            copy.infer.timing.ClearField(name)
    if copy.HasField("exported"):
        copy.exported.token = bytes(len(copy.exported.token))
    return copy


def look_into(peer: LanePeer, message: Response) -> None:
    """Write what the requests refer to; see that the worker has written what the models make."""
    if message.HasField("chunk") and not message.chunk.chunk:
        if message.chunk.role == lane_pb2.ARENA_ROLE_INPUT:
            peer.place(message.chunk, X)
    elif message.HasField("infer") and message.infer.outputs and message.infer.call > 1:
        factor = {2: 2, 3: 4}[message.infer.call]
        assert np.array_equal(peer.read(message.infer.outputs[0].ref), factor * X)
    elif message.HasField("pong") and message.pong.HasField("ref"):
        assert np.array_equal(peer.read(message.pong.ref), X[:16])
