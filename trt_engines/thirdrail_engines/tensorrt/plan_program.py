# SPDX-License-Identifier: Apache-2.0
"""A TensorRT plan as a program that runs on a device.

Not yet run on a GPU: that each name exists in every version is tested, and that plans load no
further than TensorRT gets without a device.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from thirdrail import dtypes
from thirdrail.dtypes import Buffer
from thirdrail.tensors import TensorSpec
from thirdrail_engines.cuda.device import Stream
from thirdrail_engines.cuda.program import OpenOutput, ProgramSpec
from thirdrail_engines.engine import EngineError, ModelFileError
from thirdrail_engines.plans import Profile, Shape, ShapeRange
from thirdrail_engines.tensorrt import native as t
from thirdrail_engines.tensorrt.api import Api
from thirdrail_engines.tensorrt.callbacks import Messages, make_logger
from thirdrail_engines.tensorrt.describe import describe_plan
from thirdrail_engines.tensorrt.output_allocator import Rooms, make_output_allocator
from thirdrail_engines.tensorrt.runtime_choices import choose

_DTYPES = {"FLOAT": "FP32", "HALF": "FP16"}  # the others are called as ours are


class PlanProgram:
    """See Program."""

    def __init__(
        self,
        api: Api,
        data: Buffer,
        source: str,
        *,
        graphs_max: int,
        gpu: str = "",
        plugins: Sequence[Path] = (),
        may_run_host_code: bool = False,
        cached_kernels: bytes | None = None,
    ) -> None:
        """The calling thread must have the device's context.

        source: what the plan is called in messages. gpu: the device, for messages.
        plugins, may_run_host_code: code of the plan's builder that runs in this process.
        cached_kernels: what `kernels` gave in an earlier process.
        Raises ModelFileError.
        """
        self._api = api
        self._messages = Messages()
        self._logger: t.ILogger = make_logger(api.trt, self._messages)
        self._runtime: t.Runtime = self._started(source)
        if may_run_host_code:
            self._runtime.engine_host_code_allowed = True
        self._load_plugins(plugins)
        engine: t.ICudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            what = describe_plan(bytes(data), gpu=gpu)
            raise ModelFileError(f"{source} does not load: {self.take_errors()} ({what})")
        self._engine: t.ICudaEngine = engine
        self._spec = self._read_spec(source)
        self.choices = choose(
            self._spec.profiles,
            prepares_at_run_time=api.prepares_at_run_time,
            can_share=api.can_share_memory,
            graphs_max=graphs_max,
        )
        self.activation_bytes = api.memory_size(engine) if self.choices.shares_memory else 0
        self._config: t.IRuntimeConfig | None = None
        self._cache: t.IRuntimeCache | None = None
        if api.prepares_at_run_time:
            self._config = api.runtime_config(
                engine,
                is_eager=self.choices.is_eager,
                records_graphs=self.choices.records_graphs,
            )
            self._cache = api.add_runtime_cache(self._config, cached_kernels)

    @property
    def spec(self) -> ProgramSpec:
        return self._spec

    def new_context(self, stream: Stream) -> "PlanContext":
        context: t.IExecutionContext | None = self._api.new_context(
            self._engine, self._config, shares_memory=self.choices.shares_memory
        )
        if context is None:
            raise EngineError(f"no execution context: {self.take_errors()}")
        return PlanContext(self, self._api, context)

    def kernels(self) -> bytes | None:
        """The kernels that were finished in this process, to be kept; None where there are none."""
        return self._api.runtime_cache_bytes(self._cache) if self._cache is not None else None

    def close(self) -> None:
        # In this order: each one's memory belongs to the next.
        self._cache = self._config = None
        self._engine = None
        self._runtime = None

    def take_errors(self) -> str:
        """What TensorRT logged since it was asked last."""
        said = "; ".join(self._messages.errors) or "TensorRT did not say why"
        self._messages.errors.clear()
        return said

    def _started(self, source: str) -> t.Runtime:
        try:
            runtime: t.Runtime = self._api.trt.Runtime(self._logger)
        except (TypeError, RuntimeError) as error:  # pybind11's words for a null pointer
            said = "; ".join(self._messages.errors) or str(error)
            raise ModelFileError(
                f"{source}: {self._api.title} does not start here: {said}"
            ) from None
        return runtime

    def _load_plugins(self, plugins: Sequence[Path]) -> None:
        if not plugins:
            return
        registry: t.IPluginRegistry = self._runtime.get_plugin_registry()
        for path in plugins:
            handle: object = registry.load_library(str(path))
            if handle is None:
                raise ModelFileError(f"plugin {path.name} does not load: {self.take_errors()}")

    def _read_spec(self, source: str) -> ProgramSpec:
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        for index in range(self._engine.num_io_tensors):
            name: str = self._engine.get_tensor_name(index)
            tensor = self._tensor(source, name)
            mode: t.TensorIOMode = self._engine.get_tensor_mode(name)
            (inputs if mode == self._api.trt.TensorIOMode.INPUT else outputs).append(tensor)
        return ProgramSpec(tuple(inputs), tuple(outputs), self._read_profiles(inputs))

    def _tensor(self, source: str, name: str) -> TensorSpec:
        """Raises ModelFileError for what the engine cannot bind."""
        native_type: t.DataType = self._engine.get_tensor_dtype(name)
        type_name: str = native_type.name
        dtype = dtypes.BY_NAME.get(_DTYPES.get(type_name, type_name))
        if dtype is None or dtype.numpy is None:
            raise ModelFileError(f"{source}: tensor '{name}' has the type {type_name}")
        location: t.TensorLocation = self._engine.get_tensor_location(name)
        if location != self._api.trt.TensorLocation.DEVICE:
            raise ModelFileError(
                f"{source}: tensor '{name}' sets shapes by its values, and is read on the host"
            )
        layout: t.TensorFormat = self._engine.get_tensor_format(name)
        if layout != self._api.trt.TensorFormat.LINEAR:
            raise ModelFileError(
                f"{source}: tensor '{name}' lies in memory as {layout.name}, expected LINEAR"
            )
        shape: Sequence[int] = self._engine.get_tensor_shape(name)
        return TensorSpec(name, dtype, tuple(map(int, shape)))

    def _read_profiles(self, inputs: Sequence[TensorSpec]) -> tuple[Profile, ...]:
        open_inputs = [tensor.name for tensor in inputs if -1 in tensor.shape]
        if not open_inputs:
            return ()
        count: int = self._engine.num_optimization_profiles
        return tuple(
            Profile({name: self._range(name, index) for name in open_inputs})
            for index in range(count)
        )

    def _range(self, name: str, index: int) -> ShapeRange:
        shapes: Sequence[Sequence[int]] = self._engine.get_tensor_profile_shape(name, index)
        return ShapeRange(*(tuple(map(int, shape)) for shape in shapes))


class PlanContext:
    """See Context."""

    def __init__(self, program: PlanProgram, api: Api, context: t.IExecutionContext) -> None:
        self._program = program
        self._api = api
        self._context: t.IExecutionContext = context
        self._open_inputs = [t.name for t in program.spec.inputs if -1 in t.shape]
        self._profile = 0
        self._rooms = Rooms()
        self._allocator: t.IOutputAllocator = make_output_allocator(api.trt, self._rooms)
        self._allocated: set[str] = set()

    def prepare(
        self, profile: int, shapes: Mapping[str, Shape], stream: Stream
    ) -> dict[str, Shape]:
        if profile != self._profile:
            is_set: bool = self._context.set_optimization_profile_async(profile, stream.handle)
            self._check(is_set, f"profile {profile}")
            self._profile = profile
        for name in self._open_inputs:
            is_taken: bool = self._context.set_input_shape(name, shapes[name])
            self._check(is_taken, f"the shape {list(shapes[name])} of input '{name}'")
        try:
            unset: Sequence[str] = self._context.infer_shapes()
        except RuntimeError:
            unset = ["?"]
        self._check(not unset, f"these shapes: {dict(shapes)}")
        self._rooms.bound.clear()
        return {tensor.name: self._shape(tensor.name) for tensor in self._program.spec.outputs}

    def bind(self, name: str, address: int) -> None:
        is_bound: bool = self._context.set_tensor_address(name, address)
        self._check(is_bound, f"the address of '{name}'")

    def bind_open(self, output: str, room: OpenOutput) -> None:
        self._rooms.bound[output] = room
        if output not in self._allocated:
            is_set: bool = self._context.set_output_allocator(output, self._allocator)
            self._check(is_set, f"an allocator for '{output}'")
            self._allocated.add(output)

    def use_activations(self, address: int) -> None:
        self._api.use_memory(self._context, address, self._program.activation_bytes)

    def can_record(self, stream: Stream) -> bool:
        return not self._rooms.bound and self._api.can_capture(self._context, stream.handle)

    def enqueue(self, stream: Stream) -> None:
        is_enqueued: bool = self._context.execute_async_v3(stream.handle)
        self._check(is_enqueued, "this run")

    def close(self) -> None:
        self._context = None

    def _shape(self, name: str) -> Shape:
        shape: Sequence[int] = self._context.get_tensor_shape(name)
        return tuple(map(int, shape))

    def _check(self, is_done: bool, what: str) -> None:
        if not is_done:
            raise EngineError(f"TensorRT refuses {what}: {self._program.take_errors()}")
