# SPDX-License-Identifier: Apache-2.0
"""The command that the front starts a worker with; people have no use for it."""

import argparse
from pathlib import Path

from thirdrail_server.config import WorkerConfig
from thirdrail_server.worker.process import InheritedSockets, run_worker

parser = argparse.ArgumentParser(prog="thirdrail_server.worker")
parser.add_argument("--control-fd", type=int, required=True)
parser.add_argument("--lane-fd", type=int, action="append", required=True)
parser.add_argument("--lane-listen-fd", type=int)
parser.add_argument("--front-pid", type=int, required=True)
parser.add_argument("--remove", type=Path, action="append", default=[])
parser.add_argument("--config", type=WorkerConfig.from_json, default=WorkerConfig())

if __name__ == "__main__":
    args = parser.parse_args()
    inherited = InheritedSockets(
        args.control_fd,
        tuple(args.lane_fd),
        args.front_pid,
        args.lane_listen_fd,
        tuple(args.remove),
    )
    raise SystemExit(run_worker(args.config, inherited))
