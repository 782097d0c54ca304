# SPDX-License-Identifier: Apache-2.0
"""inference.GRPCInferenceService: each method joins a translation and a part of the front."""

# ruff: noqa: N802 - the methods have the names of the protocol's calls

import logging
from collections.abc import AsyncIterator, Callable

import grpc

from thirdrail import __version__
from thirdrail.errors import InvalidArgument, Unavailable
from thirdrail_server.config import ServerConfig
from thirdrail_server.front.control.catalog import Catalog, parse_version
from thirdrail_server.front.control.model_control import ModelControl
from thirdrail_server.front.control.served_model import ServedModel
from thirdrail_server.front.dispatch import Dispatcher
from thirdrail_server.front.handlers import service_handler
from thirdrail_server.front.kserve import metadata, region_calls, repository, settings, statistics
from thirdrail_server.front.kserve.inference import InferenceCalls
from thirdrail_server.front.kserve.regions import RegionRegistry
from thirdrail_server.front.kserve.status import Context, abort, answering
from thirdrail_server.inference import grpc_service_pb2 as pb
from thirdrail_server.inference.grpc_service_pb2_grpc import GRPCInferenceServiceServicer

_SERVER_LOGGER = "thirdrail_server"


class KServeServicer(GRPCInferenceServiceServicer):
    """KServe v2 and Triton's extensions. Keeps no state but the trace and log settings.

    A gRPC server is given the `handler()`.
    """

    def __init__(
        self,
        *,
        dispatcher: Dispatcher,
        catalog: Catalog,
        control: ModelControl,
        regions: RegionRegistry,
        authorize_control: Callable[[Context], None],
        authorize_settings: Callable[[Context], None],
        config: ServerConfig,
    ) -> None:
        """authorize_control: raises the refusal of a caller who may not load and unload models.

        authorize_settings: of one who may not change what the server logs.
        """
        self._calls = InferenceCalls(
            dispatcher,
            regions,
            stream_requests_in_flight_max=config.stream_requests_in_flight_max,
        )
        self._catalog = catalog
        self._control = control
        self._regions = regions
        self._authorize_control = authorize_control
        self._authorize_settings = authorize_settings
        self._config = config
        self._trace = settings.TraceSettings()
        self._log = settings.LogSettings()

    def handler(self) -> grpc.GenericRpcHandler:
        service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
        return service_handler(service, self, abort, of_bytes=("ModelInfer", "ModelStreamInfer"))

    def begin_stop(self) -> None:
        """Not ready from now on, no new requests; open streams answer what they read, and end."""
        self._calls.begin_stop()

    # Health

    @answering
    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: Context
    ) -> pb.ServerLiveResponse:
        if self._calls.is_stopping:
            raise Unavailable("Server exiting")
        return pb.ServerLiveResponse(live=True)

    @answering
    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: Context
    ) -> pb.ServerReadyResponse:
        are_models_ready = not self._config.strict_readiness or self._catalog.all_ready()
        return pb.ServerReadyResponse(ready=are_models_ready and not self._calls.is_stopping)

    @answering
    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        # An unknown model is simply not ready: clients poll this before a model exists.
        version = parse_version(request.version)
        return pb.ModelReadyResponse(ready=self._catalog.is_ready(request.name, version))

    # Metadata

    @answering
    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: Context
    ) -> pb.ServerMetadataResponse:
        return metadata.server_metadata(
            self._config.server_name, __version__, self._regions.extensions
        )

    @answering
    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        model, version = self._catalog.find(request.name, parse_version(request.version))
        versions = [version] if request.version else model.ready_versions
        return metadata.model_metadata(_config(model), versions)

    @answering
    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        model, _ = self._catalog.find(request.name, parse_version(request.version))
        return pb.ModelConfigResponse(config=_config(model))

    # Inference

    # These two work on bytes, where the stub's types want messages.

    @answering
    async def ModelInfer(self, body: bytes, context: Context) -> bytes:  # type: ignore[override]
        return await self._calls.unary(body, context)

    # The stub's type wants a generator. One that is cancelled while gRPC writes what it yielded is
    # not cleaned up until it is collected, and its requests go on till then; so this one writes.
    @answering
    async def ModelStreamInfer(  # type: ignore[override]
        self, bodies: AsyncIterator[bytes], context: Context
    ) -> None:
        await self._calls.stream(bodies, context)

    # Statistics

    @answering
    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        version = parse_version(request.version)
        ready = [
            (model.name, ready_version)
            for model in self._catalog.models()
            for ready_version in model.ready_versions
            if request.name in ("", model.name) and version in (0, ready_version)
        ]
        if request.name and not ready:
            which = f"'{request.name}' version {version}" if version else f"'{request.name}'"
            raise InvalidArgument(f"requested model {which} is not available")
        counters = {(c.name, c.version): c for c in await self._control.counters()}
        return pb.ModelStatisticsResponse(
            model_stats=[
                statistics.model_statistics(*key, counters=counters.get(key)) for key in ready
            ]
        )

    # Repository

    @answering
    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        repository.refuse_repository_name(request.repository_name)
        lines = (line for model in self._catalog.models() for line in repository.model_index(model))
        return pb.RepositoryIndexResponse(
            models=[line for line in lines if not request.ready or line.state == "READY"]
        )

    @answering
    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        with repository.load_failures_as_known(request.model_name):
            self._authorize_control(context)
            repository.refuse_repository_name(request.repository_name)
            overrides = repository.load_overrides(request.model_name, request.parameters)
            await self._control.load(request.model_name, overrides.config, overrides.files)
        return pb.RepositoryModelLoadResponse()

    @answering
    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        with repository.refusals_as_known():
            self._authorize_control(context)
            repository.refuse_repository_name(request.repository_name)
            repository.check_unload(request.parameters)
            # Clients expect the answer once nobody gets the model any more, and then look into
            # the index.
            await self._control.unload(request.model_name, wait=False)
        return pb.RepositoryModelUnloadResponse()

    # Shared memory

    @answering
    async def SystemSharedMemoryStatus(
        self, request: pb.SystemSharedMemoryStatusRequest, context: Context
    ) -> pb.SystemSharedMemoryStatusResponse:
        return region_calls.system_status(self._regions, request.name)

    @answering
    async def SystemSharedMemoryRegister(
        self, request: pb.SystemSharedMemoryRegisterRequest, context: Context
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    @answering
    async def SystemSharedMemoryUnregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, context: Context
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        region_calls.system_unregister(self._regions, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    @answering
    async def CudaSharedMemoryStatus(
        self, request: pb.CudaSharedMemoryStatusRequest, context: Context
    ) -> pb.CudaSharedMemoryStatusResponse:
        return region_calls.cuda_status(self._regions, request.name)

    @answering
    async def CudaSharedMemoryRegister(
        self, request: pb.CudaSharedMemoryRegisterRequest, context: Context
    ) -> pb.CudaSharedMemoryRegisterResponse:
        await self._regions.register_cuda(
            request.name, request.raw_handle, request.device_id, request.byte_size
        )
        return pb.CudaSharedMemoryRegisterResponse()

    @answering
    async def CudaSharedMemoryUnregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, context: Context
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        region_calls.cuda_unregister(self._regions, request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    # Settings

    @answering
    async def TraceSetting(
        self, request: pb.TraceSettingRequest, context: Context
    ) -> pb.TraceSettingResponse:
        known = [model.name for model in self._catalog.models()]
        self._trace.forget_all_but(known)
        if request.model_name and request.model_name not in known:
            raise InvalidArgument(f"Request for unknown model : {request.model_name}")
        changes = {key: tuple(setting.value) for key, setting in request.settings.items()}
        # Open to all: nothing depends on these values, which other people's clients write anyway.
        self._trace.update(request.model_name, changes)
        return settings.trace_response(self._trace.values(request.model_name))

    @answering
    async def LogSettings(
        self, request: pb.LogSettingsRequest, context: Context
    ) -> pb.LogSettingsResponse:
        if request.settings:
            settings.checked_log(request.settings)  # what is open to nobody is said to everybody
            self._authorize_settings(context)
            self._log.update(request.settings)
            logging.getLogger(_SERVER_LOGGER).setLevel(self._log.level())
        return settings.log_response(self._log.values())


def _config(model: ServedModel) -> pb.ModelConfig:
    assert model.config is not None, "the catalog found a version that is ready, so it was loaded"
    return model.config
