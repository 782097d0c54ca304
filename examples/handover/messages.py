# SPDX-License-Identifier: Apache-2.0
"""What goes from service to service: a line of JSON for each page. The page itself does not."""

import argparse
import json
import select
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field


@dataclass
class Message:
    """token: lets the next service have the page, once."""

    number: int
    is_last: bool
    token: str
    page_bytes: int
    boxes: list[tuple[int, int, int, int]] = field(default_factory=list)  # left top right bottom
    hand_overs: list[str] = field(default_factory=list)  # what has happened to the page so far

    def note(self, what: str, copies: int) -> None:
        self.hand_overs.append(f"{what:<38}{copies} {'copy' if copies == 1 else 'copies'}")


def send(message: Message) -> None:
    print(json.dumps(asdict(message)), flush=True)


def received() -> Iterator[Message]:
    """Until the last page, or until whoever sends has ended."""
    for line in sys.stdin:
        message = Message(**json.loads(line))
        yield message
        if message.is_last:
            return


def stay_for_next() -> None:
    """Until the next service has ended: what it was offered, and has not received yet, would end
    with us.
    """
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error is reported whether it is asked for or not
    poll.poll()


def parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--url", help="of the server; by default the one that is found")
    return parser
