# SPDX-License-Identifier: Apache-2.0
"""What `thirdrail compile` is to do: which models lie at a path, and for what they are compiled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thirdrail.errors import InvalidArgument
from thirdrail_engines.compile_options import (
    CompileOptions,
    EngineChoice,
    OnFailure,
    TorchCompile,
)
from thirdrail_engines.engine import ModelFileError
from thirdrail_engines.file_modes import is_file, is_folder, is_there
from thirdrail_engines.host import cuda_devices
from thirdrail_engines.plans import Builder, Precision, ShapeRange
from thirdrail_engines.profiles import (
    PROFILES_MAX,
    GivenProfile,
    ShapesUnknown,
    read_shape_range,
)
from thirdrail_server.front.control.load_source import LoadSource, prepare
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import compile_options
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.layout import MODEL_FILENAMES, scan

SUFFIXES = (".onnx", ".pt2", ".pt")
_EXPORTED = ".pt2"
_FOR_THIS_CPU = (Builder.ONNXRUNTIME, Builder.AOT_INDUCTOR)


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line says; what it leaves open is the configuration's to say."""

    capabilities: tuple[str, ...] = ()
    engine: EngineChoice = EngineChoice.AUTO
    precision: Precision | None = None
    derive_batch_rows: int = 0
    profiles: tuple[GivenProfile, ...] = ()  # of a file, which has no configuration


@dataclass(frozen=True, slots=True)
class Job:
    """One model version. fault: why there is nothing to do.

    targets: compute capabilities, a plan for each; "" is this CPU, or what the options name.
    """

    model: str
    version: int  # 0: none is known
    path: Path
    options: CompileOptions
    builder: Builder
    targets: tuple[str, ...] = ("",)
    fault: str = ""
    warnings: tuple[str, ...] = ()  # what of its configuration has no effect

    def title(self, target: str) -> str:
        """Of one of its targets, for people."""
        if target:
            return target
        if self.builder in _FOR_THIS_CPU:
            return "this CPU"
        return ",".join(self.options.compute_capabilities) or "this GPU"

    def reason(self, error: ModelFileError) -> str:
        """In words for its owner. A file by itself has no configuration to write into."""
        if self.version or not isinstance(error, ShapesUnknown):
            return str(error)
        lines = " ".join(f"--profile '{name}={text}'" for name, text in error.suggested.items())
        return f"{error.reason}; say them, with the sizes that you use: {lines}"


def read_profiles(texts: Sequence[str]) -> tuple[GivenProfile, ...]:
    """From INPUT=SMALLEST,BEST,LARGEST; an input that is named again is of the next profile.

    Raises InvalidArgument.
    """
    profiles: list[dict[str, ShapeRange]] = []
    for text in texts:
        name, equals, shapes = text.rpartition("=")
        if not equals or not name:
            raise InvalidArgument(
                f"--profile {text[:80]!a} names no input; for example: --profile {_EXAMPLE}"
            )
        try:
            given = read_shape_range(shapes)
        except ValueError as error:
            raise InvalidArgument(f"--profile {text[:80]!a} {error}") from None
        profile = next((each for each in profiles if name not in each), None)
        if profile is None:
            profile = {}
            profiles.append(profile)
        profile[name] = given
    if len(profiles) > PROFILES_MAX:
        raise InvalidArgument(f"--profile: {len(profiles)} profiles, at most are {PROFILES_MAX}")
    return tuple(profiles)


_EXAMPLE = "'input=1x3x32x32,4x3x64x64,8x3x128x128'"


def jobs_at(path: Path, wish: Wish) -> Iterator[Job]:
    """Every version that would be served.

    path: a model file, the folder of one model, or a repository.
    Raises InvalidArgument when it is none of them.
    """
    if wish.profiles and not is_file(path):
        raise InvalidArgument(
            f"--profile is for a model file, and {path} is none: write profile.0.INPUT into its "
            "config.pbtxt, where servers read it too"
        )
    if is_file(path):
        yield from _of_file(path, wish)
    elif not is_folder(path):
        raise InvalidArgument(f"{path} does not exist, expected a model file or a folder of models")
    elif _is_model_folder(path):
        yield from _of_model(path.parent, path.resolve().name, wish)
    else:
        for name in scan(path):
            yield from _of_model(path, name, wish)


def _is_model_folder(path: Path) -> bool:
    """Whether versions lie in it, and not models."""
    return any(
        is_there(each / name)
        for each in path.iterdir()
        if each.name.isdecimal()
        for name in MODEL_FILENAMES
    )


def _of_file(path: Path, wish: Wish) -> Iterator[Job]:
    if path.suffix not in SUFFIXES:
        raise InvalidArgument(
            f"{path.name} cannot be compiled, expected a file that ends in {', '.join(SUFFIXES)}"
        )
    yield from _of_version(path.stem, 0, path, ModelConfig(name=path.stem), wish)


def _of_model(repository: Path, name: str, wish: Wish) -> Iterator[Job]:
    broken = _broken(name, 0, repository / name, wish)
    try:
        prepared = prepare(name, LoadSource(repository))
    except RepositoryError as error:
        yield replace(broken, fault=str(error))
        return
    config = prepared.command.config or ModelConfig(name=name)
    warnings = check_fields(config)
    for version, path in prepared.command.versions:
        for job in _of_version(name, version, path, config, wish):
            yield replace(job, warnings=warnings)
    for version, fault in prepared.failures.items():
        yield replace(broken, version=version, fault=fault)


def _broken(name: str, version: int, path: Path, wish: Wish) -> Job:
    """One of which no more is known: as the command line alone would have it."""
    builder = _builder(wish, CompileOptions())
    targets = () if builder in _FOR_THIS_CPU else wish.capabilities
    return Job(name, version, path, CompileOptions(), builder, targets or ("",))


def _of_version(
    name: str, version: int, path: Path, config: ModelConfig, wish: Wish
) -> Iterator[Job]:
    try:
        options = compile_options(
            config, on_failure=OnFailure.FALLBACK, derive_batch_rows=wish.derive_batch_rows
        )
    except RepositoryError as error:
        yield replace(_broken(name, version, path, wish), fault=str(error))
        return
    if wish.profiles:
        options = replace(options, profiles=wish.profiles)
    if wish.precision is not None:
        options = replace(options, precision=wish.precision)
    builder = _builder(wish, options)
    if wish.profiles and builder in _FOR_THIS_CPU and path.suffix != ".pt":
        raise InvalidArgument(
            "--profile changes nothing in a plan for this CPU, which takes every shape: leave it "
            "out, or name GPUs, as in --for sm86"
        )
    job = Job(name, version, path, options, builder)
    if path.suffix not in SUFFIXES:
        yield replace(job, fault=f"{path.name} is a plan already")
        return
    if builder is Builder.AOT_INDUCTOR and path.suffix != _EXPORTED:
        yield replace(job, fault=NO_PROGRAM)
        return
    # A model that names its GPUs is one plan for all of them, and every server asks for that one.
    if builder in _FOR_THIS_CPU or options.compute_capabilities:
        yield job
    else:
        targets = wish.capabilities or ("",)
        is_nowhere = builder is Builder.TENSORRT_RTX and not wish.capabilities
        fault = NO_TARGET if is_nowhere and not cuda_devices() else ""
        yield replace(job, targets=targets, fault=fault)


NO_PROGRAM = "PyTorch compiles programs of torch.export alone (model.pt2)"
NO_TARGET = "there is no GPU here, and none is named: say which, as in --for sm86,sm89,sm120"


def _builder(wish: Wish, options: CompileOptions) -> Builder:
    """Whose plan it is. Without a word, TensorRT for RTX: it needs no GPU to build for one."""
    choice = options.engine if wish.engine is EngineChoice.AUTO else wish.engine
    if choice in (EngineChoice.ONNXRUNTIME, EngineChoice.TENSORRT, EngineChoice.TENSORRT_RTX):
        return Builder(choice.value)
    is_compiled = choice is wish.engine or options.torch_compile is TorchCompile.AOT_INDUCTOR
    if choice is EngineChoice.TORCH and is_compiled:
        return Builder.AOT_INDUCTOR
    is_for_gpus = bool(wish.capabilities or options.compute_capabilities)
    return Builder.TENSORRT_RTX if is_for_gpus else Builder.ONNXRUNTIME
