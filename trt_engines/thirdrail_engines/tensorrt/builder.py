# SPDX-License-Identifier: Apache-2.0
"""Builds a TensorRT plan from an ONNX file. Runs in the build process."""

from collections.abc import Sequence
from pathlib import Path

from thirdrail_engines import build_timings
from thirdrail_engines.builds.result import Built, PlanTensor
from thirdrail_engines.plans import BuildError, BuildFault, PlanRequest, TellProgress
from thirdrail_engines.tensorrt import native as t
from thirdrail_engines.tensorrt import network as networks
from thirdrail_engines.tensorrt.api import load_api
from thirdrail_engines.tensorrt.callbacks import Messages, Phases, make_logger, make_monitor
from thirdrail_engines.tensorrt.capabilities import check_capabilities
from thirdrail_engines.tensorrt.declared import read_declared
from thirdrail_engines.tensorrt.refusals import (
    Circumstances,
    ParserFault,
    Refusal,
    builder_refusal,
    one_line,
    parser_refusal,
    tidy,
)
from thirdrail_engines.tensorrt.shapes import profile_fault

PLAN_NAME = "model.plan"

_WARNINGS_MAX = 10


def build(request: PlanRequest, source: Path, folder: Path, tell: TellProgress) -> Built:
    """Build the ONNX file `source`, whose weights may lie beside it, into a plan in `folder`.

    The network is always strongly typed: each layer computes in the type that the graph gives it.
    `source_layers` counts the network's layers; those of the plan can be read only on a GPU.
    Raises BuildError; OSError where the folder cannot be written; or what `tell` raised, which ends
    the build at its next step.
    """
    return _Bench(request, source, folder).build(tell)


class _Bench:
    """One build: the request, the package, and what that logs."""

    def __init__(self, request: PlanRequest, source: Path, folder: Path) -> None:
        self._request, self._source, self._folder = request, source, folder
        self._api = load_api(request.builder)
        if self._api.version != request.builder_version:
            raise BuildError(
                BuildFault.MISSING,
                f"{self._api.title} is installed now; when this build was asked for it was "
                f"{request.builder_version}. Load the model again",
            )
        check_capabilities(request.builder, request.compute_capabilities)
        self._declared = read_declared(source)
        if fault := self._declared.dtype_fault():
            raise BuildError(BuildFault.REFUSED, one_line(f"{source.name}: {fault}"))
        self._messages = Messages()
        self._logger: t.ILogger = make_logger(self._api.trt, self._messages)

    def build(self, tell: TellProgress) -> Built:
        native = self._start()
        plugin_warnings = self._load_plugins(native)
        tell("reading the graph", 0, 0)
        typed: t.NetworkDefinitionCreationFlag = self._api.trt.NetworkDefinitionCreationFlag
        network: t.INetworkDefinition = native.create_network(1 << int(typed.STRONGLY_TYPED))
        # The network's weights are the parser's, which has to live as long.
        parser = self._parse(network)
        tensors = networks.tensors_of(network)
        self._check(network, tensors)
        config = self._configure(native)
        self._add_profiles(native, config)
        plan = self._serialize(native, network, config, Phases(tell))
        del parser
        tell("writing the plan", 0, 0)
        path = self._folder / PLAN_NAME
        path.write_bytes(memoryview(plan))
        warnings = (*plugin_warnings, *self._warnings())
        return Built(path, {}, networks.layers_of(network), tensors, warnings)

    def _start(self) -> t.Builder:
        try:
            native: t.Builder = self._api.trt.Builder(self._logger)
        except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer
            said = "; ".join(tidy(text) for text in self._messages.errors) or str(error)
            raise BuildError(
                BuildFault.MISSING, f"{self._api.title} does not start here: {said}"
            ) from None
        if self._request.threads_max:
            native.max_threads = self._request.threads_max
        return native

    def _load_plugins(self, native: t.Builder) -> list[str]:
        """Returns a warning for each."""
        registry: t.IPluginRegistry = native.get_plugin_registry()
        for path in self._request.plugins:
            handle: object | None = registry.load_library(str(path.absolute()))
            if handle is None:
                raise self._refused(f"the plugin {path.name}", builder_refusal(self._errors()))
        return [
            f"the plugin {path.name} is trusted code: it runs with the rights of the build, and "
            "with those of the server once the plan is loaded"
            for path in self._request.plugins
        ]

    def _parse(self, network: t.INetworkDefinition) -> t.OnnxParser:
        parser: t.OnnxParser = self._api.trt.OnnxParser(network, self._logger)
        is_parsed: bool = parser.parse_from_file(str(self._source))
        if is_parsed:
            return parser
        faults = []
        for index in range(parser.num_errors):
            error: t.ParserError = parser.get_error(index)
            code: t.ErrorCode = error.code()
            text: str = error.desc()
            names: tuple[str, str] = (error.node_name(), error.node_operator())
            faults.append(ParserFault(code.name, self._without_folder(text), *names))
        raise self._refused("the model", parser_refusal(faults, self._errors()))

    def _check(self, network: t.INetworkDefinition, tensors: Sequence[PlanTensor]) -> None:
        """Refuse what TensorRT would refuse in unclear words."""
        inputs = [tensor for tensor in tensors if tensor.is_input]
        fault = profile_fault(inputs, self._request.profiles)
        if names := networks.shape_inputs(network):
            fault = f"the values of input '{names[0]}' set shapes, which no profile here can bound"
        if fault:
            raise BuildError(BuildFault.REFUSED, one_line(f"{self._source.name}: {fault}"))

    def _configure(self, native: t.Builder) -> t.IBuilderConfig:
        request, trt = self._request, self._api.trt
        config: t.IBuilderConfig = native.create_builder_config()
        self._api.set_targets(config, request.compute_capabilities)
        if request.workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_bytes)
        if request.optimization_level is not None:
            config.builder_optimization_level = request.optimization_level
        if request.is_version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if request.is_refittable:
            config.set_flag(trt.BuilderFlag.REFIT)
        return config

    def _add_profiles(self, native: t.Builder, config: t.IBuilderConfig) -> None:
        for index, wanted in enumerate(self._request.profiles):
            profile: t.IOptimizationProfile = native.create_optimization_profile()
            for name, shapes in wanted.inputs.items():
                profile.set_shape(name, shapes.smallest, shapes.best, shapes.largest)
            added: int = config.add_optimization_profile(profile)
            if added != index:
                raise self._refused(f"profile {index}", builder_refusal(self._errors()))

    def _serialize(
        self,
        native: t.Builder,
        network: t.INetworkDefinition,
        config: t.IBuilderConfig,
        phases: Phases,
    ) -> t.IHostMemory:
        monitor: t.IProgressMonitor = make_monitor(self._api.trt, phases)
        config.progress_monitor = monitor
        times = self._request.uses_timing_cache and self._api.has_timing_cache
        if times:
            self._set_timings(config)
        plan: t.IHostMemory | None = native.build_serialized_network(network, config)
        if phases.stopped_by is not None:
            raise phases.stopped_by
        if plan is None:
            known = Circumstances(networks.same_names(network), self._declared.conditionals)
            raise self._refused("the model", builder_refusal(self._errors(), known))
        if times:
            timings: t.ITimingCache = config.get_timing_cache()
            path = self._folder / build_timings.FILE_NAME
            path.write_bytes(memoryview(timings.serialize()))
        return plan

    def _set_timings(self, config: t.IBuilderConfig) -> None:
        """Begin with those of earlier builds, unless the package refuses them."""
        path = self._folder / build_timings.FILE_NAME
        if data := path.read_bytes() if path.is_file() else b"":
            earlier: t.ITimingCache | None = config.create_timing_cache(data)
            if earlier is not None and config.set_timing_cache(earlier, False):
                return
            self._messages.add("WARNING", "the timings of earlier builds do not fit, and are new")
        config.set_timing_cache(config.create_timing_cache(b""), False)

    def _warnings(self) -> list[str]:
        """What TensorRT itself warned of, each once."""
        said = list(dict.fromkeys(tidy(text) for text in self._messages.warnings))
        if len(said) > _WARNINGS_MAX:
            said[_WARNINGS_MAX:] = [f"and {len(said) - _WARNINGS_MAX} more warnings"]
        return said

    def _errors(self) -> list[str]:
        return [self._without_folder(text) for text in self._messages.errors]

    def _without_folder(self, text: str) -> str:
        return text.replace(f"{self._source.parent}/", "")

    def _refused(self, what: str, refusal: Refusal) -> BuildError:
        verb = {
            BuildFault.CANCELLED: "stopped building",
            BuildFault.MISSING: "cannot build",
            BuildFault.OUT_OF_MEMORY: "ran out of memory for",
        }.get(refusal.fault, "refused")
        text = f"{self._source.name}: {self._api.title} {verb} {what}: {refusal.text}"
        return BuildError(refusal.fault, one_line(text))
