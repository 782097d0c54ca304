# SPDX-License-Identifier: Apache-2.0
"""Loads and closes a model again and again, as a worker does, and prints what stayed.

Arguments: the model's path, the number of cycles. Prints the growth in bytes and in threads as
JSON.
"""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np

from thirdrail_engines import EngineOptions, Inspector, load, use_one_arena

WARM_CYCLES = 2  # code and pools that stay are touched once


def main() -> None:
    use_one_arena()
    path, cycles = Path(sys.argv[1]), int(sys.argv[2])
    with Inspector(idle_s=600) as inspector:
        for number in range(WARM_CYCLES + cycles):
            # As a server loads: each time in another thread.
            thread = threading.Thread(target=cycle, args=(path, inspector))
            thread.start()
            thread.join()
            if number == WARM_CYCLES - 1:
                before, threads = resident_bytes(), thread_count()
        grown = resident_bytes() - before
        print(json.dumps({"grown_bytes": grown, "grown_threads": thread_count() - threads}))


def cycle(path: Path, inspector: Inspector) -> None:
    engine = load(path, options=EngineOptions(threads_max=2), inspector=inspector).engine
    engine.run({"x": np.ones((64, 1024), np.float32)}, ["y"], {})
    engine.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    main()
