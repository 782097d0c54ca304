# SPDX-License-Identifier: Apache-2.0
"""The reader: reads the lines that the detector has found, off the page that the camera has
written.
"""

from collections.abc import Sequence
from pathlib import Path

import messages
import numpy as np
import pages

import thirdrail
from thirdrail.lane.exports import SharedTensor
from thirdrail_server.demo.text_boxes import Box
from thirdrail_server.demo.text_lines import ReadText, alphabet, decode, recognition_input

MIB = 1 << 20


def main() -> None:
    parser = messages.parser(__doc__)
    parser.add_argument("--characters", type=Path, required=True, help="the model's, one a line")
    arguments = parser.parse_args()
    characters = alphabet(arguments.characters.read_text("utf-8"))
    with thirdrail.Client(arguments.url, transport="lane") as client:
        for message in messages.received():
            with client.receive(message.token) as page:
                boxes = [Box(*box) for box in message.boxes]
                lines = [read(client, page, box, characters) for box in boxes]
                message.note(f"the reader cuts out {len(lines)} lines", 0)
            show(message, lines)


def read(
    client: thirdrail.Client, page: SharedTensor, box: Box, characters: Sequence[str]
) -> ReadText:
    pixels = pages.crop(page.array, box)  # the third read
    whole = Box(0, 0, pixels.shape[1], pixels.shape[0])
    strip = recognition_input(pixels, whole)[np.newaxis]
    answer = client.infer("ocr_recognition", {"x": strip})
    return decode(answer["fetch_name_0"][0], characters)


def show(message: messages.Message, lines: Sequence[ReadText]) -> None:
    print(f"page {message.number}: {message.page_bytes / MIB:.1f} MiB, written once")
    for hand_over in message.hand_overs:
        print(f"  {hand_over}")
    for line in lines:
        print(f"    {line.text}")
    print(flush=True)


if __name__ == "__main__":
    main()
