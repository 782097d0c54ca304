# SPDX-License-Identifier: Apache-2.0
"""Real models over the lane, beside ONNX Runtime in the caller's own process."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from bench import servers
from bench.batching import MAGIKA_FETCH
from bench.batching import MAGIKA_FOLDER as DEMO_FOLDER
from bench.lane_load import timed
from bench.measure import Contender, difference, interleave
from bench.options import Options
from bench.report import Table
from thirdrail import Client
from thirdrail.tensors import Array
from thirdrail_engines.onnxruntime_session import open_session
from thirdrail_engines.options import EngineOptions

TARGETS = {
    "ocr_detection": ("PP-OCR detection, 1x3x960x960", 300),
    "silero_vad": ("Silero VAD, 512 samples", 120),
}
COLUMNS = ("", "p50 us", "p99 us", "calls/s", "p50 above in-process, us")


def run(options: Options) -> Iterator[Table]:
    if not DEMO_FOLDER.is_dir():
        yield Table("real models", f"Not measured: no {DEMO_FOLDER}; run {MAGIKA_FETCH}", ())
        return
    with (
        servers.thirdrail(DEMO_FOLDER, options.folder) as server,
        Client(server.unix, transport="lane") as client,
    ):
        for model, (title, target_us) in TARGETS.items():
            yield _measure(model, title, target_us, client, options)


def _measure(model: str, title: str, target_us: int, client: Client, options: Options) -> Table:
    inputs = _inputs(model)
    bare = _bare(DEMO_FOLDER / model, inputs)
    placed = {name: _placed(client, array) for name, array in inputs.items()}

    def borrowed() -> None:
        client.infer(model, placed, borrow=True).release()

    def ordinary() -> None:
        client.infer(model, inputs)

    contenders = [
        Contender("in process", timed(bare)),
        Contender("lane, ordinary arrays", timed(ordinary)),
        Contender("lane, placed and borrowed", timed(borrowed)),
        Contender("in process, each after one by lane", timed(bare, ordinary)),
        Contender("lane, each after one in process", timed(ordinary, bare)),
    ]
    series = interleave(contenders, 2 * options.seconds)
    bare_series = (series[0], series[3])
    rows = []
    for each in series:
        beside = series[3] if each is series[4] else series[0]
        above = difference(each, beside, lambda turn: turn.p50_us).text(0)
        rows.append(
            (
                each.name,
                f"{each.percentile_us(50):.0f}",
                f"{each.percentile_us(99):.0f}",
                f"{each.calls_per_s:.1f}",
                "" if each in bare_series else above,
            )
        )
    return Table(
        title,
        "ONNX Runtime with the same options and threads in this process, and served. Target: at "
        f"most {target_us} us added. In the last two rows one call follows the other, and the last "
        "is above the one before.",
        COLUMNS,
        rows,
    )


def _inputs(model: str) -> dict[str, Array]:
    random = np.random.default_rng(1)
    if model == "ocr_detection":
        return {"x": random.standard_normal((1, 3, 960, 960), np.float32)}
    return {
        "input": random.standard_normal((1, 576), np.float32) / 10,
        "state": np.zeros((2, 1, 128), np.float32),
        "sr": np.array(16000, np.int64),
    }


def _bare(folder: Path, inputs: Mapping[str, Array]) -> Callable[[], object]:
    (path,) = folder.glob("*/model.onnx")
    session = open_session(path, EngineOptions(threads_max=os.cpu_count() or 1))
    names = [output.name for output in session.get_outputs()]
    return lambda: session.run(names, dict(inputs))


def _placed(client: Client, array: Array) -> Array:
    place = client.empty(array.shape, array.dtype)
    place[...] = array
    return place
