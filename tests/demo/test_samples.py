# SPDX-License-Identifier: Apache-2.0
"""Tests of samples.py and page.py: the inputs are what they claim to be."""

import gzip
import io
import sqlite3
import zipfile

import numpy as np
from PIL import Image

from thirdrail_server.demo import page, samples


def content_by_name() -> dict[str, bytes]:
    return {sample.name: sample.content for sample in samples.samples()}


def test_every_text_file_is_sent() -> None:
    on_disk = {path.name for path in samples.TEXT_FOLDER.iterdir()}
    assert on_disk == set(samples.TEXT_LABELS)


def test_archives_hold_the_text_files() -> None:
    content = content_by_name()
    with zipfile.ZipFile(io.BytesIO(content["texts.zip"])) as archive:
        assert archive.read("parts.json") == content["parts.json"]
    assert gzip.decompress(content["readings.csv.gz"]) == content["readings.csv"]


def test_database_can_be_opened() -> None:
    database = sqlite3.connect(":memory:")
    try:
        database.deserialize(content_by_name()["parts.db"])
        assert database.execute("SELECT COUNT(*) FROM parts").fetchone() == (2,)
    finally:
        database.close()


def test_page_has_ink_where_the_lines_are_and_an_empty_margin() -> None:
    pixels = page.render()
    assert pixels.shape == (page.PAGE_HEIGHT, page.PAGE_WIDTH, 3)
    is_ink = pixels.max(axis=2) < 128
    assert not is_ink[:, : page.MARGIN].any()
    # Rows of ink come in one band per line; the dot of an i does not part a band of a whole line.
    bands = np.count_nonzero(np.diff(is_ink.any(axis=1).astype(int)) == 1)
    assert bands == len(page.LINES)


def test_images_show_the_page() -> None:
    with Image.open(io.BytesIO(content_by_name()["page.png"])) as image:
        assert np.array_equal(np.asarray(image), page.render())
