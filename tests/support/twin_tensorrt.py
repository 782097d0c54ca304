# SPDX-License-Identifier: Apache-2.0
"""TensorRT's runtime as far as our code calls it, on the twin of a device.

A "plan" is the path of an ONNX file, which ONNX Runtime computes. The rules that it checks are
those of TensorRT's documentation: shapes within the chosen profile, every tensor with an address or
an allocator before a run, nothing closed before what was made of it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from thirdrail_engines import Inspector
from thirdrail_engines.cuda.twin import TwinDevice
from thirdrail_engines.cuda.twin_program import TwinContext, TwinProgram
from thirdrail_engines.plans import Builder, Profile, Shape
from thirdrail_engines.tensorrt.api import Api

ACTIVATION_BYTES = 4096  # of any plan
TYPES = {"FP32": "FLOAT", "FP16": "HALF"}


class Base:
    """What Python code derives from: ILogger, IOutputAllocator."""


def member(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name)


def twin_api(
    device: TwinDevice,
    inspector: Inspector,
    profiles: Callable[[Path], tuple[Profile, ...]],
    *,
    is_rtx: bool = False,
) -> Api:
    trt: Any = SimpleNamespace(
        ILogger=Base,
        IOutputAllocator=Base,
        TensorIOMode=SimpleNamespace(INPUT=member("INPUT"), OUTPUT=member("OUTPUT")),
        TensorLocation=SimpleNamespace(DEVICE=member("DEVICE"), HOST=member("HOST")),
        TensorFormat=SimpleNamespace(LINEAR=member("LINEAR"), CHW32=member("CHW32")),
    )
    trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="ours", STATIC="its own")
    trt.ICudaEngine, trt.IExecutionContext = Engine, Context
    trt.Runtime = lambda logger: Runtime(trt, logger, device, inspector, profiles)
    if is_rtx:
        trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager", NONE="none")
        trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole", DISABLED="disabled")
    builder = Builder.TENSORRT_RTX if is_rtx else Builder.TENSORRT
    return Api(builder, trt, "0.0")


class Runtime:
    def __init__(
        self,
        trt: Any,
        logger: Any,
        device: TwinDevice,
        inspector: Inspector,
        profiles: Callable[[Path], tuple[Profile, ...]],
    ) -> None:
        self.trt, self.logger, self.device = trt, logger, device
        self._inspector, self._profiles = inspector, profiles
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes) -> "Engine | None":
        path = Path(bytes(data).decode())
        if not path.is_file():
            self.logger.log(member("ERROR"), f"no plan: {path}")
            return None
        profiles = self._profiles(path)
        return Engine(
            self, TwinProgram(path, self.device, profiles, self._inspector, ACTIVATION_BYTES)
        )


class RuntimeConfig:
    def __init__(self) -> None:
        self.allocation_strategy = ""
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = ""
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.allocation_strategy = strategy

    def create_runtime_cache(self) -> "RuntimeCache":
        return RuntimeCache()

    def set_runtime_cache(self, cache: "RuntimeCache") -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Each context that had to finish its kernels adds a byte."""

    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, data: bytes) -> bool:
        is_ours = data.strip(b"k") == b""
        self.data = data if is_ours else b""
        return is_ours

    def serialize(self) -> bytes:
        return self.data


class Engine:
    device_memory_size_v2 = ACTIVATION_BYTES

    def __init__(self, runtime: Runtime, program: TwinProgram) -> None:
        self.runtime, self.program, self._trt = runtime, program, runtime.trt
        self._tensors = {t.name: t for t in (*program.spec.inputs, *program.spec.outputs)}
        self._inputs = {t.name for t in program.spec.inputs}
        self.num_io_tensors = len(self._tensors)
        self.num_optimization_profiles = max(1, len(program.spec.profiles))
        self.config: RuntimeConfig | None = None
        self.host_tensors: set[str] = set()

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._trt.TensorIOMode
        return modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        dtype = self._tensors[name].dtype.name
        return member(TYPES.get(dtype, dtype))

    def get_tensor_location(self, name: str) -> Any:
        return self._trt.TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> Any:
        return self._trt.TensorFormat.LINEAR

    def get_tensor_shape(self, name: str) -> Shape:
        return self._tensors[name].shape

    def get_tensor_profile_shape(self, name: str, index: int) -> list[Shape]:
        known = self.program.spec.profiles[index].inputs[name]
        return [known.smallest, known.best, known.largest]

    def create_runtime_config(self) -> RuntimeConfig:
        self.config = RuntimeConfig()
        return self.config

    def create_execution_context(self, how: "RuntimeConfig | str") -> "Context":
        if isinstance(how, str):
            assert self.config is None
            return Context(self, how)
        assert how is self.config
        if how.cache is not None and not how.cache.data:
            how.cache.data += b"k"
        return Context(self, how.allocation_strategy)


class Context:
    def __init__(self, engine: Engine, whose_memory: str) -> None:
        self._engine, self._runtime = engine, engine.runtime
        self._has_own = whose_memory == "its own"
        self._lent = 0
        self._inner = TwinContext(engine.program, engine.runtime.device)
        if self._has_own:
            self._inner.activation_bytes = 0
        self._profile = 0
        spec = engine.program.spec
        self._fixed = {t.name: t.shape for t in spec.inputs if -1 not in t.shape}
        self._given: dict[str, Shape] = {}
        self._outputs: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._runtime.device.stream_of(stream)
        self._profile = index
        self._given.clear()  # as TensorRT does
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        known = self._engine.program.spec.profiles[self._profile].inputs[name]
        is_within = all(
            low <= dim <= high
            for low, dim, high in zip(known.smallest, shape, known.largest, strict=True)
        )
        if not is_within:
            self._runtime.logger.log(member("ERROR"), f"{name} {list(shape)} is not in the profile")
            return False
        self._given[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        shapes = self._fixed | self._given
        missing = [t.name for t in self._engine.program.spec.inputs if t.name not in shapes]
        if not missing:
            self._outputs = self._engine.program.output_shapes(shapes)
        return missing

    def get_tensor_shape(self, name: str) -> Shape:
        return self._outputs[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert not self._has_own
        assert nbytes >= ACTIVATION_BYTES
        self._lent = address

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        self._allocators[name] = allocator
        return True

    def execute_async_v3(self, handle: int) -> bool:
        stream = self._runtime.device.stream_of(handle)
        self._inner.prepare(self._profile, self._fixed | self._given, stream)
        for name, address in self._addresses.items():
            self._inner.bind(name, address)
        for name, shape in self._outputs.items():
            if -1 in shape:
                self._inner.bind_open(name, AskedRoom(name, self._allocators[name], handle))
        self._inner.use_activations(self._lent)
        try:
            self._inner.enqueue(stream)
        except Exception as error:
            self._runtime.logger.log(member("ERROR"), str(error))
            return False
        return True


class AskedRoom:
    """An open output as TensorRT asks for it."""

    def __init__(self, name: str, allocator: Any, stream: int) -> None:
        self._name, self._allocator, self._stream = name, allocator, stream

    def reserve(self, nbytes: int) -> int:
        address: int = self._allocator.reallocate_output_async(
            self._name, 0, nbytes, 256, self._stream
        )
        return address

    def tell(self, shape: Shape) -> None:
        self._allocator.notify_shape(self._name, shape)
