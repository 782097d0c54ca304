# SPDX-License-Identifier: Apache-2.0
"""thirdrail.v1.Models: the catalog and the model control, over gRPC."""
# ruff: noqa: N802 - the methods have the names of the protocol's calls

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
from google.protobuf import text_format

from thirdrail.errors import Unavailable
from thirdrail.v1 import models_pb2 as pb
from thirdrail.v1 import models_pb2_grpc
from thirdrail_server.control_messages import LoadProgress, VersionEngine
from thirdrail_server.front.control.catalog import Catalog, parse_version
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.served_model import ServedModel
from thirdrail_server.front.statuses import failures_as_status
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.model_config import parse_text
from thirdrail_server.repository.specs import input_specs, output_specs

Context = grpc.aio.ServicerContext[Any, Any]

NO_ENGINE = VersionEngine("")  # of a version that does not serve
PROGRESS_REPORTS_MAX = 64  # waiting for a caller that reads slowly; the oldest are dropped


class ModelsServicer(models_pb2_grpc.ModelsServicer):
    """authorize_control: raises the refusal of a caller who may not load and unload models."""

    def __init__(
        self,
        catalog: Catalog,
        control: ModelControl,
        authorize_control: Callable[[Context], None],
    ) -> None:
        self._catalog = catalog
        self._control = control
        self._authorize_control = authorize_control

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        async with failures_as_status(context):
            statuses = (each for model in self._catalog.models() for each in statuses_of(model))
            shown = (
                each
                for each in statuses
                if not request.ready_only or each.state == pb.MODEL_STATE_READY
            )
            return pb.ListResponse(models=shown)

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        async with failures_as_status(context):
            return describe(*self._find_also_broken(request.name, request.version))

    async def Load(
        self, request: pb.LoadRequest, context: Context
    ) -> AsyncIterator[pb.LoadResponse]:
        async with failures_as_status(context):
            self._authorize_control(context)
            config = None
            if request.config_pbtxt:
                config = parse_text(request.config_pbtxt.encode(), request.name, "config_pbtxt")
            progress = _Progress()
            load = asyncio.create_task(
                self._control.load(request.name, config, None, progress.tell)
            )
            load.add_done_callback(progress.end)
            last = pb.LoadResponse()
            try:
                async for last in progress:
                    if last.phase != "ready":  # that is said once, with the versions
                        yield last
                last.MergeFrom(pb.LoadResponse(phase="ready", done=True, versions=await load))
                yield last
            finally:
                load.cancel()

    async def Unload(self, request: pb.UnloadRequest, context: Context) -> pb.UnloadResponse:
        async with failures_as_status(context):
            self._authorize_control(context)
            await self._control.unload(request.name)
            return pb.UnloadResponse()

    async def Watch(
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncIterator[pb.WatchResponse]:
        async with failures_as_status(context):
            wanted = set(request.names)
            told: dict[str, dict[int, pb.ModelStatus]] = {}
            with self._catalog.subscribe() as changes:
                for model in self._catalog.models():
                    if not wanted or model.name in wanted:
                        for status in _news(model, told):
                            yield pb.WatchResponse(status=status, initial=True)
                async for name in changes:
                    if name and (not wanted or name in wanted):
                        current = self._catalog.get(name) or ServedModel(name, ())
                        for status in _news(current, told):
                            yield pb.WatchResponse(status=status)
            raise Unavailable("the server is stopping")

    def _find_also_broken(self, name: str, version: int) -> tuple[ServedModel, int]:
        wanted = parse_version(version)
        model = self._catalog.get(name)
        if model is None or (wanted and model.status(wanted) is None):
            return self._catalog.find(name, wanted)  # raises what is wrong
        newest = (*model.ready_versions, *(each.version for each in model.versions))
        return model, wanted or max(model.ready_versions, default=max(newest))


class _Progress:
    """A load's reports, on their way to the caller. Bounded; ends with the load."""

    def __init__(self) -> None:
        self._reports: deque[pb.LoadResponse] = deque(maxlen=PROGRESS_REPORTS_MAX)
        self._wake = asyncio.Event()
        self._is_over = False

    def tell(self, progress: LoadProgress) -> None:
        self._reports.append(
            pb.LoadResponse(
                phase=progress.phase,
                step=progress.step,
                steps=progress.steps,
                phase_step=progress.phase_step,
                phase_steps=progress.phase_steps,
            )
        )
        self._wake.set()

    def end(self, _load: object) -> None:
        self._is_over = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[pb.LoadResponse]:
        while self._reports or not self._is_over:
            while self._reports:
                yield self._reports.popleft()
            if not self._is_over:
                self._wake.clear()
                await self._wake.wait()


def statuses_of(model: ServedModel) -> Iterator[pb.ModelStatus]:
    """One per version."""
    for each in model.versions:
        engine = model.engines.get(each.version, NO_ENGINE)
        yield pb.ModelStatus(
            name=model.name,
            version=each.version,
            state=each.state,
            reason=each.reason,
            engine=engine.name,
            worker=model.worker,
            is_expected_back=model.is_expected_back,
            engine_reason=engine.reason,
            load_phase=model.load_phase,
            workers=model.workers_of(each.version) if each.version else (),
        )


def _news(
    model: ServedModel, told: dict[str, dict[int, pb.ModelStatus]]
) -> Iterator[pb.ModelStatus]:
    """What a watcher has not been told yet, which it then counts as told."""
    before = told.get(model.name, {})
    now = {each.version: each for each in statuses_of(model)}
    told[model.name] = now
    for version in sorted(before.keys() - now.keys() - {0}):
        gone = pb.ModelStatus(name=model.name, version=version)
        gone.state = pb.MODEL_STATE_UNAVAILABLE
        gone.reason = "no longer served"
        yield gone
    yield from (each for version, each in now.items() if before.get(version) != each)


def describe(model: ServedModel, version: int) -> pb.DescribeResponse:
    """All there is to say about one version of a model."""
    config = model.config or ModelConfig()
    return pb.DescribeResponse(
        status=next(each for each in statuses_of(model) if each.version == version),
        ready_versions=model.ready_versions,
        inputs=[spec.to_message() for spec in input_specs(config)],
        outputs=[spec.to_message() for spec in output_specs(config)],
        batch_rows_max=max(config.max_batch_size, 0),
        instances=model.instances or sum(max(each.count, 1) for each in config.instance_group),
        config_pbtxt=text_format.MessageToString(config),
        warnings=model.warnings,
        inputs_in_place=model.in_place.get(version, ()),
        engine_report=model.engines.get(version, NO_ENGINE).report,
    )
