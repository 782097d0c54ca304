# SPDX-License-Identifier: Apache-2.0
"""A real grpc.aio server with the KServe servicer, and behind it models that answer on command."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from support.killable import until
from support.regions import Regions, SharedMemory, files_in_shm
from support.server import RunningServer, running_server
from thirdrail.errors import ThirdrailError
from thirdrail.lane.input_arena import Piece, bytes_of
from thirdrail.v1 import inference_pb2, metrics_pb2, tensor_pb2
from thirdrail_server.config import ServerConfig
from thirdrail_server.control_messages import LoadedModel
from thirdrail_server.front.control.catalog import Catalog
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.worker_load import TellProgress
from thirdrail_server.front.dispatch import Dispatcher, Result
from thirdrail_server.front.kserve.regions import RegionRegistry
from thirdrail_server.front.kserve.servicer import KServeServicer
from thirdrail_server.front.kserve.status import Context
from thirdrail_server.inference import grpc_service_pb2 as kserve
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceStub

MIB = 1 << 20


@dataclass
class EchoResult(Result):
    """A result whose memory is taken back at its release, as the lane's is."""

    releases: int = 0

    def release(self) -> None:
        self.releases += 1
        for each in self.data:
            if isinstance(each, memoryview):
                each.release()


class EchoDispatcher(Dispatcher):
    """Gives each request its inputs back as outputs, when the gate of its id is open.

    A request without a gate passes at once. The id "fail:NAME" fails with REASON_NAME; the id
    "crash" meets a bug.
    """

    def __init__(self, catalog: Catalog) -> None:
        super().__init__(catalog)
        self.gates: dict[str, asyncio.Event] = {}
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.requests: list[inference_pb2.InferRequest] = []
        self.flows: list[int] = []
        self.results: list[EchoResult] = []

    async def infer(
        self, request: inference_pb2.InferRequest, data: Sequence[Piece | None], *, flow: int
    ) -> EchoResult:
        self.started.append(request.request_id)
        self.requests.append(request)
        self.flows.append(flow)
        try:
            if request.request_id in self.gates:
                await self.gates[request.request_id].wait()
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        if request.request_id == "crash":
            raise RuntimeError("secret")
        result = self._result(request, data)
        self.results.append(result)
        return result

    def _result(
        self, request: inference_pb2.InferRequest, data: Sequence[Piece | None]
    ) -> EchoResult:
        kind, _, reason = request.request_id.partition(":")
        if kind == "fail":
            code = inference_pb2.Reason.Value(f"REASON_{reason}")
            status = inference_pb2.Status(reason=code, message=f"it was {reason}")
            return EchoResult(inference_pb2.InferResponse(status=status, final=True), [])
        outputs = [
            tensor_pb2.Tensor(name=each.name, data_type=each.data_type, shape=each.shape)
            for each in request.inputs
        ]
        response = inference_pb2.InferResponse(
            model_name=request.model_name,
            model_version=request.model_version or 1,
            outputs=outputs,
            final=True,
        )
        return EchoResult(response, [memoryview(bytearray(bytes_of(each or b""))) for each in data])


class RecordingControl(ModelControl):
    """A model control that notes every load and unload, or fails as it is told."""

    def __init__(self) -> None:  # the real one's parts are not there
        self.loads: list[tuple[str, kserve.ModelConfig | None, dict[str, bytes]]] = []
        self.unloads: list[tuple[str, bool]] = []
        self.failure: Exception | None = None
        self.figures: list[metrics_pb2.ModelCounters] = []

    async def load(
        self,
        name: str,
        config: kserve.ModelConfig | None = None,
        files: Mapping[str, bytes] | None = None,
        progress: TellProgress = lambda _progress: None,
    ) -> list[int]:
        if self.failure is not None:
            raise self.failure
        self.loads.append((name, config, dict(files or {})))
        return [1]

    async def unload(self, name: str, *, wait: bool = True) -> None:
        if self.failure is not None:
            raise self.failure
        self.unloads.append((name, wait))

    async def counters(self) -> list[metrics_pb2.ModelCounters]:
        return self.figures


@dataclass
class Serving:
    address: str
    stub: GRPCInferenceServiceStub
    servicer: KServeServicer
    server: grpc.aio.Server
    catalog: Catalog
    dispatcher: EchoDispatcher
    control: RecordingControl
    refusal: list[ThirdrailError]  # the first, if any, is what control and settings answer


def echo_config(name: str) -> kserve.ModelConfig:
    return kserve.ModelConfig(
        name=name,
        platform="onnxruntime_onnx",
        max_batch_size=4,
        input=[kserve.ModelInput(name="X", data_type=kserve.TYPE_FP32, dims=[2])],
        output=[kserve.ModelOutput(name="X", data_type=kserve.TYPE_FP32, dims=[2])],
    )


def example_catalog() -> Catalog:
    """M: versions 1 and 3 ready, 2 broken. off: unloaded."""
    catalog = Catalog(models_max=8, watchers_max=1)
    catalog.expect(["M"])
    catalog.begin_load("M", [1, 2, 3], "cpu")
    versions: dict[int, str | None] = {1: None, 2: "it is broken", 3: None}
    catalog.end_load("M", LoadedModel(echo_config("M"), versions), "cpu")
    catalog.begin_load("off", [1], "cpu")
    catalog.end_load("off", LoadedModel(echo_config("off"), {1: None}), "cpu")
    catalog.end_unload("off")
    return catalog


Serve = Callable[..., AbstractAsyncContextManager[Serving]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """`async with serve(**config) as serving`: a server on a Unix socket, and a stub to call it."""

    @asynccontextmanager
    async def running(**config: int | str | bool) -> AsyncIterator[Serving]:
        refusal: list[ThirdrailError] = []

        def authorize(context: Context) -> None:
            for error in refusal:
                raise error

        settings = ServerConfig(repository=tmp_path, **config)  # type: ignore[arg-type]
        catalog, control = example_catalog(), RecordingControl()
        dispatcher = EchoDispatcher(catalog)
        servicer = KServeServicer(
            dispatcher=dispatcher,
            catalog=catalog,
            control=control,
            regions=RegionRegistry(
                settings.regions, is_enabled=settings.allow_client_shm, owners=None
            ),
            authorize_control=authorize,
            authorize_settings=authorize,
            config=settings,
        )
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((servicer.handler(),))
        address = f"unix:{tmp_path}/s"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = GRPCInferenceServiceStub(channel)
            yield Serving(address, stub, servicer, server, catalog, dispatcher, control, refusal)
        await server.stop(None)

    return running


@pytest.fixture(scope="session")
def region_server(
    standard_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server whose clients may register shared memory."""
    folder = tmp_path_factory.mktemp("server")
    with running_server(standard_repository, folder, ["--allow-client-shm=true"]) as running:
        yield running


@pytest.fixture
def regions(region_server: RunningServer) -> Iterator[Regions]:
    """What a test has registered is unregistered; no file descriptor may be left of it."""
    with region_server.channel() as channel:
        calls = Regions(channel)
        yield calls
        calls.unregister()
        assert calls.status() == {}
        until(lambda: files_in_shm(region_server.pid) == [])


@pytest.fixture
def memory(regions: Regions) -> Iterator[SharedMemory]:
    """1 MiB, registered from its second byte on as "R"."""
    with SharedMemory(MIB) as made:
        regions.register("R", made.key, MIB - 1, offset=1)
        yield made
