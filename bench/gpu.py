# SPDX-License-Identifier: Apache-2.0
"""A device's memory handed over, beside the host's arena and the wire; the engine beside the bare
program. Needs a GPU; `--twin` runs all of it on a device made of host memory, so that the code is
tested: those figures say nothing.

Not yet run on a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import models, servers
from bench.lane_load import timed
from bench.measure import Contender, Series, interleave, ratio
from bench.options import Options
from bench.report import Table
from thirdrail import Client

if TYPE_CHECKING:
    from thirdrail_engines.cuda.device import Device as EngineDevice
    from thirdrail_engines.cuda.program import Program

QUESTION = "device memory beside host arena and wire, 64 B to 256 MiB; engine beside bare program"

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)
SIZES_ON_TWIN = (64, 4 * KIB, 32 * KIB)  # its worker's profiles end at 10,000 elements
ROWS = (1, models.MLP_ROWS_MAX)
TESTS = Path(__file__).parent.parent / "tests"


@dataclass(frozen=True, slots=True)
class Place:
    """Where it is measured. module: what to run as the server."""

    title: str
    model: str
    sizes: tuple[int, ...]
    module: str
    note: str


GPU = Place("GPU", "scale", SIZES, "thirdrail", "")
TWIN = Place(
    "twin of a GPU",
    "twin_scale",
    SIZES_ON_TWIN,
    "support.twin_lane_server",
    "The twin is host memory and threads of Python: its figures show that the code runs.",
)


def run(options: Options) -> Iterator[Table]:
    """Raises SystemExit with one line where there is no GPU."""
    place = TWIN if options.is_twin else _gpu()
    yield from _hand_over(place, options)
    for rows in ROWS:
        yield _engines(place, rows, options)


def _gpu() -> Place:
    from thirdrail_engines.host import cuda_devices, why_no_cuda_device

    if not cuda_devices():
        raise SystemExit(
            f"bench gpu needs a GPU: {why_no_cuda_device()}. --twin runs its code without one"
        )
    return GPU


# Handing over


def _hand_over(place: Place, options: Options) -> Iterator[Table]:
    from thirdrail import Device

    largest = max(place.sizes)
    models.write_scale(options.folder / "models", place.model, largest)
    arguments = [f"--lane-memory-mib={max(1024, 8 * largest // MIB)}"]
    with (
        servers.thirdrail(
            options.folder / "models",
            options.folder,
            arguments,
            module=place.module,
            python_path=TESTS if place is TWIN else None,
        ) as server,
        Client(server.unix, transport="lane") as lane,
        Client(server.unix, transport="grpc") as wire,
    ):
        device = Device(lane)
        engine = next(each.engine for each in lane.models() if each.name == place.model)
        for size in place.sizes:
            contenders = [
                *_on_device(device, place.model, size),
                *_on_host(lane, place.model, size),
                *_over_wire(wire, place.model, size),
            ]
            yield _hand_over_table(place, size, engine, interleave(contenders, options.seconds))


def _on_device(device: Any, model: str, size: int) -> Iterator[Contender]:
    x = device.array(models.floats(size))

    def call() -> None:  # "done" is an array of the host: it is there when the device is done
        with device.infer(model, {"x": x}, on_host=("done",)) as result:
            assert result["y"].nbytes == size

    yield Contender("device memory", timed(call))


def _on_host(lane: Client, model: str, size: int) -> Iterator[Contender]:
    source = models.floats(size)
    x = lane.empty(source.shape, source.dtype)
    np.copyto(x, source)

    def in_place() -> None:
        with lane.infer(model, {"x": x}, borrow=True) as result:
            assert result["y"].nbytes == size

    def copied() -> None:
        assert lane.infer(model, {"x": source})["y"].nbytes == size

    yield Contender("host arena, in place", timed(in_place))
    yield Contender("host arena, ordinary arrays", timed(copied))


def _over_wire(wire: Client, model: str, size: int) -> Iterator[Contender]:
    x = models.floats(size)

    def call() -> None:
        assert wire.infer(model, {"x": x})["y"].nbytes == size

    yield Contender("wire: gRPC, UDS", timed(call))


def _hand_over_table(place: Place, size: int, engine: str, series: list[Series]) -> Table:
    moved = 2 * size  # there and back
    rows = [
        (
            each.name,
            f"{each.percentile_us(50):.0f}",
            f"{each.percentile_us(99):.0f}",
            f"{moved / each.percentile_us(50) / 1e3:.2f}",
            ratio(each, series[0], lambda slice_: slice_.p50_us).text(),
        )
        for each in series
    ]
    return Table(
        f"{_text(size)} there and back, {place.title}",
        f"y = 2x by {engine or 'the default engine'}; one call at a time, until the result can be "
        "read where it is wanted.",
        ("tensor in", "p50 us", "p99 us", "GB/s", "p50 to device memory"),
        rows,
        [place.note] if place.note else [],
    )


# The engine beside what it runs


def _engines(place: Place, rows: int, options: Options) -> Table:
    """An MLP of 4 layers of 1024: from arrays to arrays by the engine, and the bare program."""
    path = models.write_mlp(options.folder / "mlp")
    x = np.random.default_rng(0).random((rows, models.MLP_WIDTH), np.float32)
    with contextlib.ExitStack() as stack:
        contenders = list(_programs(place, path, x, options.folder, stack))
        if place is GPU:
            contenders += _torch(x)
        series = interleave(contenders, options.seconds)
    first = series[0]
    return Table(
        f"MLP, {rows} rows, {place.title}",
        "In this process, one run at a time. The engine: from an array to an array, through pinned "
        "memory. The others: on the device alone, until it is done.",
        ("", "p50 us", "p99 us", "p50 to the engine"),
        [
            (
                each.name,
                f"{each.percentile_us(50):.0f}",
                f"{each.percentile_us(99):.0f}",
                ratio(each, first, lambda slice_: slice_.p50_us).text(),
            )
            for each in series
        ],
        [place.note] if place.note else [],
    )


def _programs(
    place: Place, path: Path, x: Any, folder: Path, stack: contextlib.ExitStack
) -> Iterator[Contender]:
    from thirdrail_engines.cuda.engine import CudaEngine, CudaOptions

    device = _engine_device(place)
    stack.callback(device.close)
    for name, make in _makers(place, path, device, folder, stack):
        engine = CudaEngine(make(), device, "tensorrt_plan", CudaOptions())
        stack.callback(engine.close)
        yield Contender(f"engine, {name}", _engine_call(engine, x))
        yield Contender(f"bare, {name}", _bare_call(make(), device, x, stack))


def _engine_call(engine: Any, x: Any) -> Any:
    return timed(lambda: engine.run({"x": x}, ["y"], {}))


def _bare_call(
    program: "Program", device: "EngineDevice", x: Any, stack: contextlib.ExitStack
) -> Any:
    """Memory and shapes are bound once."""
    stream = device.new_stream()
    context = program.new_context(stream)
    memory = device.allocate(max(2 * x.nbytes, 512))
    stack.callback(program.close)
    stack.callback(stream.close)
    stack.callback(context.close)
    stack.callback(device.free, memory)
    context.prepare(0, {"x": x.shape}, stream)
    context.bind("x", memory)
    context.bind("y", memory + x.nbytes)
    if program.activation_bytes:
        activations = device.allocate(program.activation_bytes)
        stack.callback(device.free, activations)
        context.use_activations(activations)

    def call() -> None:
        context.enqueue(stream)
        stream.synchronize()

    return timed(call)


def _engine_device(place: Place) -> "EngineDevice":
    if place is TWIN:
        from thirdrail_engines.cuda.twin import TwinDevice

        return TwinDevice()
    from thirdrail_engines.cuda.driver import open_device

    return open_device()


def _makers(
    place: Place, path: Path, device: "EngineDevice", folder: Path, stack: contextlib.ExitStack
) -> Iterator[tuple[str, Callable[[], "Program"]]]:
    """Programs of the model, by who made them."""
    from thirdrail_engines.plans import Profile, ShapeRange

    ends = [(size, models.MLP_WIDTH) for size in (1, ROWS[-1], ROWS[-1])]
    profiles = (Profile({"x": ShapeRange(*ends)}),)
    if place is TWIN:
        from thirdrail_engines import Inspector
        from thirdrail_engines.cuda.twin import TwinDevice
        from thirdrail_engines.cuda.twin_program import TwinProgram

        assert isinstance(device, TwinDevice)
        inspector = stack.enter_context(Inspector())
        yield "ONNX Runtime on the twin", lambda: TwinProgram(path, device, profiles, inspector)
        return
    from thirdrail_engines.plans import PlanRequest
    from thirdrail_engines.tensorrt import installed_builders
    from thirdrail_engines.tensorrt.api import load_api
    from thirdrail_engines.tensorrt.builder import build
    from thirdrail_engines.tensorrt.plan_program import PlanProgram

    for builder, version in installed_builders():
        made = folder / builder
        made.mkdir(exist_ok=True)
        request = PlanRequest(path, builder, version, profiles=profiles)
        plan = build(request, path, made, lambda *_: None).plan.read_bytes()

        def load(plan: bytes = plan, builder: Any = builder) -> "Program":
            return PlanProgram(load_api(builder), plan, path.name, graphs_max=0)

        yield f"{builder} {version}", load


def _torch(x: Any) -> Iterator[Contender]:
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    layers: list[Any] = []
    for _ in range(models.MLP_LAYERS):
        layers += [torch.nn.Linear(models.MLP_WIDTH, models.MLP_WIDTH), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers[:-1]).eval().cuda()
    source = torch.from_numpy(x).cuda()

    def call() -> None:
        with torch.inference_mode():
            module(source)
        torch.cuda.synchronize()

    yield Contender(f"PyTorch {torch.__version__}", timed(call))


def _text(size: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"
