# SPDX-License-Identifier: Apache-2.0
"""Three services read a page: a camera, a detector and a reader, each a process of its own.

The page is written once, into shared memory, and read three times where it lies. What goes from
process to process is a line of text with a token in it. This program fetches the models, starts a
server and the services, and joins the output of each to the input of the next.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import thirdrail
from thirdrail_server.demo.child_server import ServerError, serving, wait_until_ready
from thirdrail_server.demo.fetch import FetchError, fetch
from thirdrail_server.demo.pinned import PACKAGES

HERE = Path(__file__).parent
OCR = [package for package in PACKAGES if package.name == "rapidocr"]
STOP_S_MAX = 30

Source = IO[bytes] | int | None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python examples/handover",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(".demo/models"),
        help="the model repository: models are put and kept here, 27 MB on the first run",
    )
    parser.add_argument(
        "--wheels", type=Path, help="take the wheels from this folder and leave the network alone"
    )
    parser.add_argument("--pages", type=int, default=2, help="how many pages the camera takes")
    arguments = parser.parse_args()
    try:
        fetch(arguments.dir, packages=OCR, wheels=arguments.wheels)
        with server(arguments.dir) as url:
            return read_pages(url, arguments.dir, arguments.pages)
    except (FetchError, ServerError) as error:
        print(error, file=sys.stderr)
        return 1


@contextlib.contextmanager
def server(repository: Path) -> Iterator[str]:
    """A server with the models; its URL."""
    with tempfile.TemporaryDirectory(prefix="thirdrail-handover-") as folder:
        socket, log = Path(folder) / "grpc.sock", Path(folder) / "server.log"
        url = f"unix:{socket}"
        with serving(repository, socket, log) as process, thirdrail.Client(url) as client:
            wait_until_ready(process, log, lambda: is_ready(client))
            yield url


def is_ready(client: thirdrail.Client) -> bool:
    try:
        return client.health("ocr_detection") and client.health("ocr_recognition")
    except thirdrail.ThirdrailError:
        return False


def read_pages(url: str, repository: Path, pages: int) -> int:
    """Runs the services until every page is read. Returns 0 if none of them failed."""
    characters = repository / "ocr_recognition" / "characters.txt"
    with contextlib.ExitStack() as stack:

        def start(name: str, *options: str, stdin: Source) -> subprocess.Popen[bytes]:
            stdout = None if name == "reader" else subprocess.PIPE
            command = [sys.executable, str(HERE / f"{name}.py"), f"--url={url}", *options]
            process = subprocess.Popen(command, stdin=stdin, stdout=stdout)
            stack.callback(stop, process)
            return process

        camera = start("camera", f"--pages={pages}", stdin=subprocess.DEVNULL)
        detector = start("detector", stdin=camera.stdout)
        reader = start("reader", f"--characters={characters}", stdin=detector.stdout)
        for ours in (camera.stdout, detector.stdout):
            assert ours is not None
            ours.close()  # so that a service sees when its neighbour has ended
        statuses = [each.wait() for each in (reader, detector, camera)]
        return 1 if any(statuses) else 0


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
