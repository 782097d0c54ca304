# SPDX-License-Identifier: Apache-2.0
"""The page as the detection model wants it: blue, green and red planes [1, 3, height, width], from
-1 to 1. It is shared in this form, so that nobody has to convert it.
"""

import numpy as np

from thirdrail_server.demo.text_boxes import Box, Floats, Pixels

INK_CONTRAST_MIN = 0.2  # of a box with text in it, where black on white has 2


def write(target: Floats, pixels: Pixels) -> None:
    """RGB pixels [height, width, 3] into planes [1, 3, height, width]: the one time that it is
    written.
    """
    np.divide(pixels[:, :, ::-1].transpose(2, 0, 1), 127.5, out=target[0], casting="unsafe")
    target -= 1


def crop(planes: Floats, box: Box) -> Pixels:
    """A part of the page as RGB pixels. Nothing but this part is read."""
    part = planes[0, :, box.top : box.bottom, box.left : box.right]
    pixels: Pixels = np.rint((part + 1) * 127.5).astype(np.uint8)
    return pixels.transpose(1, 2, 0)[:, :, ::-1]


def has_ink(planes: Floats, box: Box) -> bool:
    part = planes[0, :, box.top : box.bottom, box.left : box.right]
    return bool(part.size) and float(np.ptp(part)) >= INK_CONTRAST_MIN
