# SPDX-License-Identifier: Apache-2.0
"""The detector: finds the lines of each page, with a model and a look of its own, and hands the
page on.
"""

import dataclasses

import messages
import pages

import thirdrail
from thirdrail.lane.exports import SharedTensor
from thirdrail_server.demo.text_boxes import find_boxes


def main() -> None:
    arguments = messages.parser(__doc__).parse_args()
    with thirdrail.Client(arguments.url, transport="lane") as client:
        for message in messages.received():
            with client.receive(message.token) as page:
                detect(client, page, message)
                export = client.export(page)  # the reader gets the camera's page, not a copy
                message.token = export.token
                message.note("detector -> reader", export.copies)
                messages.send(message)
        messages.stay_for_next()


def detect(client: thirdrail.Client, page: SharedTensor, message: messages.Message) -> None:
    height, width = page.shape[2:]
    # First read: by the model, where the page lies.
    with client.infer("ocr_detection", {"x": page}, borrow=True) as result:
        boxes = find_boxes(result["fetch_name_0"][0, 0], height, width)
        message.note("the model reads it and answers", result.timing.copies)
    # Second read: by ourselves, as an array.
    boxes = [box for box in boxes if pages.has_ink(page.array, box)]
    message.note(f"the detector looks into {len(boxes)} boxes", 0)
    message.boxes = [dataclasses.astuple(box) for box in boxes]


if __name__ == "__main__":
    main()
