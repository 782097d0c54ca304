# SPDX-License-Identifier: Apache-2.0
"""Triton beside Thirdrail: the tritonserver inside PyPI's nvidia-pytriton, by the KServe protocol.

That wheel has Triton's python backend alone. Its C++ backends, which it lacks, answer faster than a
model in Python can; so this compares two servers with what they come with.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil

from bench import models, servers
from bench.identity import IN_FLIGHT, SIZE_BYTES, contender
from bench.load import Job, LoadGenerator
from bench.measure import Series, interleave, ratio
from bench.options import Options
from bench.report import Table

QUESTION = "Triton's server beside ours, by KServe calls (make bench-triton)"

VERSION = "0.7.0"
VENV = Path(".tools/triton")
# The rest of what the package asks for serves its own Python interface, which is not used here.
PACKAGES = (f"nvidia-pytriton=={VERSION}", "numpy<2")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
COLUMNS = ("server", "p50 us", "p99 us", "calls/s", "server CPU us/call", "calls/s to Triton")

CONFIG = """
name: "identity"
backend: "python"
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ -1 ] } ]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

MODEL = """
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        x = triton.get_input_tensor_by_name(request, "x").as_numpy()
        return triton.InferenceResponse(output_tensors=[triton.Tensor("y", x)])
"""


class CannotRun(Exception):
    """Triton cannot be had or does not start here. The text says why."""


def run(options: Options) -> Iterator[Table]:
    try:
        install()
        yield from _compare(options)
    except CannotRun as error:
        yield Table("Triton", f"Not measured: {error}", ())


def install() -> None:
    """Put the wheel into .tools/triton. Raises CannotRun."""
    if (VENV / "installed").exists():
        return
    pip = [str(VENV / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", *PACKAGES]
    try:
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run(pip, check=True)
    except subprocess.CalledProcessError as error:
        raise CannotRun(f"its packages could not be installed: {error}") from None
    stub = _tritonserver() / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.exists():
        raise CannotRun(f"the wheel has no python backend for Python {PYTHON}")
    shutil.copy2(stub, _tritonserver() / "backends" / "python")
    (VENV / "installed").touch()


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(VENV)}))


def _tritonserver() -> Path:
    return _site_packages() / "pytriton" / "tritonserver"


@contextlib.contextmanager
def triton(folder: Path) -> Iterator[servers.Server]:
    """The server with its identity model, on TCP alone. Raises CannotRun."""
    repository, port, log = folder / "triton-models", servers.free_port(), folder / "triton.log"
    _write_model(repository)
    command = [str(_tritonserver() / "bin" / "tritonserver"), f"--model-repository={repository}"]
    command += [f"--backend-directory={_tritonserver() / 'backends'}", "--allow-http=false"]
    command += ["--allow-metrics=false", f"--grpc-port={port}", "--grpc-address=127.0.0.1"]
    # The backend's embedded Python finds numpy by way of the `python3` that comes first.
    environment = {**os.environ, "PATH": f"{(VENV / 'bin').resolve()}:{os.environ['PATH']}"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    address = f"{servers.HOST}:{port}"
    try:
        _wait(process, address, log)
        first = psutil.Process(process.pid)
        processes = [first, *first.children(recursive=True)]
        yield servers.Server("triton, python backend", process, "", address, processes)
    finally:
        servers.stop(process)


def _write_model(repository: Path) -> None:
    (repository / "identity" / "1").mkdir(parents=True)
    (repository / "identity" / "config.pbtxt").write_text(CONFIG)
    (repository / "identity" / "1" / "model.py").write_text(MODEL)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """It listens once its models are loaded, and ends when one cannot be."""
    deadline = time.monotonic() + servers.READY_S_MAX
    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(grpc.FutureTimeoutError):
                return ready.result(timeout=0.2)
    raise CannotRun(f"tritonserver did not start:\n{_causes(log)}")


def _causes(log: Path) -> str:
    """The lines of errors and warnings; the rest is tables."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if line.startswith(("E", "W", "error"))) or "no reason"


def _compare(options: Options) -> Iterator[Table]:
    repository = options.folder / "models"
    models.write_identity(repository)
    request = models.kserve_request("identity", "x", models.floats(SIZE_BYTES))
    with (
        servers.thirdrail(repository, options.folder) as ours,
        triton(options.folder) as theirs,
        LoadGenerator() as load,
    ):
        for in_flight in IN_FLIGHT:
            contenders = [
                contender(load, each, Job(each.tcp, request, in_flight, is_kserve=True))
                for each in (ours, theirs)
            ]
            yield _table(in_flight, interleave(contenders, options.seconds))


def _table(in_flight: int, series: list[Series]) -> Table:
    ours, theirs = series
    rows = []
    for each in series:
        rows.append(
            (
                each.name,
                f"{each.percentile_us(50):.0f}",
                f"{each.percentile_us(99):.0f}",
                f"{each.calls_per_s:.0f}",
                " + ".join(f"{us:.0f}" for us in each.server_cpu_us),
                ratio(ours, theirs, lambda one: one.calls_per_s).text() if each is ours else "",
            )
        )
    return Table(
        f"KServe ModelInfer, 64 B identity, {in_flight} in flight, TCP",
        f"Triton 2.51.0 from nvidia-pytriton {VERSION} with a Python identity model; its C++ "
        "backends are faster. Thirdrail with an ONNX identity. Client: generated synchronous stub "
        "in a process of its own. CPU: per process, servers first.",
        COLUMNS,
        rows,
    )
