# SPDX-License-Identifier: Apache-2.0
"""The camera: writes each page into shared memory, once, and hands it over."""

import messages
import numpy as np
import pages

import thirdrail
from thirdrail_server.demo import page


def main() -> None:
    parser = messages.parser(__doc__)
    parser.add_argument("--pages", type=int, default=1)
    arguments = parser.parse_args()
    with thirdrail.Client(arguments.url, transport="lane") as client:
        for number in range(1, arguments.pages + 1):
            picture = page.render()
            height, width = picture.shape[:2]
            planes = client.empty((1, 3, height, width), np.float32, shared=True)
            pages.write(planes, picture)
            export = client.export(planes)
            message = messages.Message(
                number, number == arguments.pages, export.token, planes.nbytes
            )
            message.note("camera -> detector", export.copies)
            messages.send(message)
        messages.stay_for_next()


if __name__ == "__main__":
    main()
