# SPDX-License-Identifier: Apache-2.0
"""Each honoured field of the field table has its effect: one check per row, none missing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from thirdrail.dtypes import BYTES
from thirdrail_engines.compile_options import CompileOptions, EngineChoice, OnFailure
from thirdrail_engines.plans import Precision
from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.compilation import compile_options
from thirdrail_server.repository.device_choice import CPU, Device, devices_of
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import FIELDS, Fate, check_fields
from thirdrail_server.repository.layout import model_file, scan
from thirdrail_server.repository.model_config import parse_text, read_config
from thirdrail_server.repository.options import ModelOptions, model_options
from thirdrail_server.repository.versions import chosen

QUEUE_REQUESTS_MAX = 99
BATCHES = "max_batch_size: 8 dynamic_batching { %s }"
INPUT = "input { name: 'x' data_type: TYPE_FP32 dims: [3] }"
WARMUP = """max_batch_size: 4
    input [{ name: 'x' data_type: TYPE_FP32 dims: [3] }]
    model_warmup { name: 'w' %s inputs { key: 'x' value {
        data_type: TYPE_FP32 dims: [3] %s } } }"""

TENSORRTS = (EngineChoice.TENSORRT, EngineChoice.TENSORRT_RTX)  # by what is installed

Check = Callable[[Path], None]
CHECKS: dict[str, Check] = {}


def honours(path: str) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS[path] = check
        return check

    return register


GPUS = (Device("GPU-one"), Device("GPU-other"))


def parse(text: str) -> ModelConfig:
    return text_format.Parse(text, ModelConfig(name="m"))


def options(text: str, folder: Path = Path("/nowhere")) -> ModelOptions:
    return model_options(parse(text), folder, queue_requests_max=QUEUE_REQUESTS_MAX)


def compiled(text: str) -> CompileOptions:
    return compile_options(parse(text), on_failure=OnFailure.FALLBACK)


def refusal(text: str, folder: Path = Path("/nowhere")) -> str:
    with pytest.raises(RepositoryError) as caught:
        options(text, folder)
    start = "model 'm': "
    assert str(caught.value).startswith(start)
    return str(caught.value).removeprefix(start)


@honours("name")
def name(_: Path) -> None:
    assert options("").name == "m"
    with pytest.raises(RepositoryError, match='is for model "n"'):
        parse_text(b"name: 'n'", "m")


@honours("platform")
def platform(_: Path) -> None:
    assert compiled("platform: 'onnxruntime_onnx'").engine is EngineChoice.AUTO
    assert compiled("platform: 'tensorrt_plan'").engine in TENSORRTS
    with pytest.raises(RepositoryError, match="platform: "):
        check_fields(parse("platform: 'ensemble'"))


@honours("backend")
def backend(_: Path) -> None:
    assert compiled("backend: 'pytorch'").engine is EngineChoice.AUTO
    assert compiled("backend: 'tensorrt_rtx'").engine is EngineChoice.TENSORRT_RTX
    with pytest.raises(RepositoryError, match="backend: "):
        check_fields(parse("backend: 'python'"))


@honours("version_policy.latest.num_versions")
def latest(_: Path) -> None:
    policy = parse("version_policy { latest { num_versions: 2 } }").version_policy
    assert chosen(policy, [1, 2, 3]) == [2, 3]


@honours("version_policy.all")
def every_version(_: Path) -> None:
    assert chosen(parse("version_policy { all {} }").version_policy, [1, 2, 3]) == [1, 2, 3]


@honours("version_policy.specific.versions")
def specific(_: Path) -> None:
    policy = parse("version_policy { specific { versions: 2 } }").version_policy
    assert chosen(policy, [1, 2, 3]) == [2]


@honours("max_batch_size")
def max_batch_size(_: Path) -> None:
    alone = options(f"max_batch_size: 8 {INPUT}")
    assert alone.batch_rows_max == 8
    assert alone.inputs[0].shape == (-1, 3)
    assert alone.queue.rows_max == 0  # requests may have rows, but nothing asks to merge them
    assert options(INPUT).batch_rows_max == 0
    assert options(INPUT).inputs[0].shape == (3,)
    assert refusal("max_batch_size: -1") == "max_batch_size must be 0 or more, got -1"


@honours("input.name")
def input_name(_: Path) -> None:
    assert options(INPUT).inputs[0].name == "x"
    assert refusal(INPUT + INPUT) == "input 'x' is declared twice"
    assert refusal("input {}") == "input[0] needs a name of 1 to 1024 characters"


@honours("input.data_type")
def input_data_type(_: Path) -> None:
    spec = options("input { name: 'x' data_type: TYPE_STRING dims: [] }").inputs[0]
    assert spec.dtype is BYTES
    assert spec.shape == ()
    for written in ("TYPE_INVALID", "99"):
        text = refusal(f"input {{ name: 'x' data_type: {written} }}")
        assert text.startswith("tensor 'x' needs a data_type, got ")


@honours("input.dims")
def input_dims(_: Path) -> None:
    text = "input { name: 'x' data_type: TYPE_BOOL dims: [%s] }"
    assert options(text % "-1, 0, 5").inputs[0].shape == (-1, 0, 5)
    assert "-1 (any size) or more, got [-2]" in refusal(text % "-2")
    assert "fewer than 16 dims" in refusal(text % ",".join("1" * 16))


@honours("input.optional")
def optional(_: Path) -> None:
    text = "input { name: 'x' data_type: TYPE_BOOL dims: [1] optional: %s }"
    assert [options(text % word).inputs[0].optional for word in ("true", "false")] == [True, False]


@honours("output.name")
@honours("output.data_type")
@honours("output.dims")
def output(_: Path) -> None:
    [spec] = options("output { name: 'y' data_type: TYPE_INT64 dims: [-1, 2] }").outputs
    assert (spec.name, spec.dtype.name, spec.shape) == ("y", "INT64", (-1, 2))
    assert "output 'y' is declared twice" in refusal("output { name: 'y' } output { name: 'y' }")
    assert "output 'y' needs fewer" in refusal("output { name: 'y' dims: -5 }")


@honours("output.label_filename")
def label_filename(folder: Path) -> None:
    text = "output { name: 'y' data_type: TYPE_FP32 dims: [2] label_filename: 'labels.txt' }"
    (folder / "labels.txt").write_bytes("Schäferhund\r\na\u2028b\n\nend\n".encode())
    assert options(text, folder).labels == {"y": ("Schäferhund", "a\u2028b", "", "end")}
    (folder / "labels.txt").write_bytes(b"\xff")
    assert "the label file of output 'y' is not UTF-8" in refusal(text, folder)
    (folder / "labels.txt").unlink()
    assert "output 'y' 'labels.txt': No such file" in refusal(text, folder)


@honours("dynamic_batching")
def dynamic_batching(_: Path) -> None:
    assert options(BATCHES % "").queue.rows_max == 8
    assert options("dynamic_batching {}").queue.rows_max == 0  # nothing to batch along


@honours("dynamic_batching.preferred_batch_size")
def preferred_batch_size(_: Path) -> None:
    batches = options(BATCHES % "preferred_batch_size: [8, 4, 4]")
    assert batches.queue.preferred_rows == (4, 8)
    assert refusal(BATCHES % "preferred_batch_size: 9") == (
        "dynamic_batching: preferred_batch_size is (9,), "
        "expected sizes from 1 to max_batch_size, which is 8"
    )
    assert "preferred_batch_size" in refusal(BATCHES % "preferred_batch_size: 0")


@honours("dynamic_batching.max_queue_delay_microseconds")
def max_queue_delay(_: Path) -> None:
    delayed = options(BATCHES % "max_queue_delay_microseconds: 500")
    assert delayed.queue.delay_us_max == 500
    text = refusal(BATCHES % "max_queue_delay_microseconds: 18446744073709551615")
    assert "max_queue_delay_microseconds must be at most 86400000000 (a day)" in text


@honours("dynamic_batching.priority_levels")
@honours("dynamic_batching.default_priority_level")
def priorities(_: Path) -> None:
    queue = options(BATCHES % "priority_levels: 3 default_priority_level: 2").queue
    assert (queue.priority_levels, queue.default_priority) == (3, 2)
    assert refusal(BATCHES % "priority_levels: 3") == (
        "dynamic_batching: default_priority_level is 0, expected 1 to priority_levels, which is 3"
    )
    assert "default_priority_level is 1" in refusal(BATCHES % "default_priority_level: 1")
    assert "priority_levels is 9999" in refusal(BATCHES % "priority_levels: 9999")


@honours("dynamic_batching.default_queue_policy.timeout_action")
def timeout_action(_: Path) -> None:
    delays = options(BATCHES % "default_queue_policy { timeout_action: DELAY }")
    assert delays.queue.timeout_action == "delay"
    assert options(BATCHES % "").queue.timeout_action == "reject"


@honours("dynamic_batching.default_queue_policy.default_timeout_microseconds")
def default_timeout(_: Path) -> None:
    policy = "default_queue_policy { default_timeout_microseconds: %d }"
    assert options(BATCHES % (policy % 70)).queue.timeout_us_default == 70
    assert "default_timeout_microseconds" in refusal(BATCHES % (policy % (1 << 63)))


@honours("dynamic_batching.default_queue_policy.allow_timeout_override")
def allow_timeout_override(_: Path) -> None:
    policy = "default_queue_policy { default_timeout_microseconds: 70 %s }"
    assert options(BATCHES % (policy % "")).queue.wait_us(50) == 70
    allowed = options(BATCHES % (policy % "allow_timeout_override: true"))
    assert allowed.queue.wait_us(50) == 50
    assert options("").queue.wait_us(50) == 50  # no limit is configured, so none is overridden


@honours("dynamic_batching.default_queue_policy.max_queue_size")
def max_queue_size(_: Path) -> None:
    bounded = options(BATCHES % "default_queue_policy { max_queue_size: 7 }")
    assert bounded.queue.requests_max == 7
    assert options(BATCHES % "").queue.requests_max == QUEUE_REQUESTS_MAX
    assert options("").queue.requests_max == QUEUE_REQUESTS_MAX


@honours("dynamic_batching.priority_queue_policy.timeout_action")
@honours("dynamic_batching.priority_queue_policy.default_timeout_microseconds")
@honours("dynamic_batching.priority_queue_policy.allow_timeout_override")
@honours("dynamic_batching.priority_queue_policy.max_queue_size")
def priority_queue_policy(_: Path) -> None:
    text = """priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: %d value {
        timeout_action: DELAY default_timeout_microseconds: 9 allow_timeout_override: true
        max_queue_size: 5 } }"""
    queue = options(BATCHES % (text % 2)).queue
    second = queue.of(2)
    assert (second.timeout_action, second.timeout_us_default) == ("delay", 9)
    assert (second.wait_us(4), second.requests_max) == (4, 5)
    assert queue.of(1).requests_max == QUEUE_REQUESTS_MAX
    assert "priority_queue_policy is [3]" in refusal(BATCHES % (text % 3))


@honours("instance_group.kind")
def kind(_: Path) -> None:
    assert devices_of(parse("instance_group { kind: KIND_CPU }"), GPUS) == {CPU: 1}
    assert devices_of(parse("instance_group { kind: KIND_GPU }"), GPUS) == dict.fromkeys(GPUS, 1)


@honours("instance_group.gpus")
def gpus(_: Path) -> None:
    assert devices_of(parse("instance_group { gpus: [1] }"), GPUS) == {GPUS[1]: 1}


@honours("instance_group.count")
def count(_: Path) -> None:
    assert options("").instances == 1
    assert options("instance_group { count: 3 } instance_group {}").instances == 4
    for text in ("instance_group { count: -1 }", "instance_group { count: 257 }"):
        assert refusal(text).startswith("instance_group counts must be 0 or more and 256 at most")


@honours("default_model_filename")
def default_model_filename(folder: Path) -> None:
    (folder / "m/1").mkdir(parents=True)
    path = folder / "m/1/other.onnx"
    path.write_bytes(b"")
    (folder / "m/config.pbtxt").write_text("default_model_filename: 'other.onnx'")
    config = read_config(scan(folder)["m"])
    assert config is not None
    assert model_file(scan(folder)["m"], 1, config.default_model_filename) == path


ACCELERATOR = "optimization.execution_accelerators.gpu_execution_accelerator"


@honours(ACCELERATOR)
@honours(f"{ACCELERATOR}.name")
@honours(f"{ACCELERATOR}.parameters")
def gpu_accelerator(_: Path) -> None:
    text = (
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' "
        "parameters { key: 'precision_mode' value: 'FP16' } "
        "parameters { key: 'max_workspace_size_bytes' value: '3145728' } } } }"
    )
    found = compiled(text)
    assert found.engine in TENSORRTS
    assert found.precision is Precision.FP16
    assert found.workspace_bytes == 3 << 20
    ours = "parameters { key: 'engine' value { string_value: 'onnxruntime' } }"
    assert compiled(text + ours).engine is EngineChoice.ONNXRUNTIME
    assert compiled(text.replace("'tensorrt'", "'cuda'")).engine is EngineChoice.AUTO


@honours("parameters")
@honours("parameters.string_value")
def parameters(_: Path) -> None:
    text = "parameters { key: 'intra_op_thread_count' value { string_value: '%s' } }"
    assert options(text % "4").engine_threads == 4
    assert options(text % "4").parameters == {"intra_op_thread_count": "4"}
    assert options("").engine_threads == 0
    for wrong in ("-1", "x", "", "1025", "9" * 5000, "٣", "1\\n"):
        assert "must be a number of threads from 0" in refusal(text % wrong)


@honours("model_warmup")
@honours("model_warmup.name")
@honours("model_warmup.inputs")
def warmup(_: Path) -> None:
    [request] = options(WARMUP % ("", "zero_data: true")).warmup
    assert request.name == "w"
    assert list(request.inputs) == ["x"]
    assert options("").warmup == ()
    unknown = (WARMUP % ("", "zero_data: true")).replace("key: 'x'", "key: 'z'")
    assert refusal(unknown) == ("model_warmup 'w': unknown inputs ['z'], missing inputs ['x']")


@honours("model_warmup.batch_size")
def warmup_batch_size(_: Path) -> None:
    [request] = options(WARMUP % ("batch_size: 4", "zero_data: true")).warmup
    assert request.inputs["x"].shape == (4, 3)
    text = refusal(WARMUP % ("batch_size: 5", "zero_data: true"))
    assert text == "model_warmup 'w': batch_size must be at most 4, got 5"
    unbatched = (WARMUP % ("batch_size: 1", "zero_data: true")).replace("max_batch_size: 4", "")
    [request] = options(unbatched).warmup
    assert request.inputs["x"].shape == (3,)


@honours("model_warmup.count")
def warmup_count(_: Path) -> None:
    assert options(WARMUP % ("count: 5", "zero_data: true")).warmup[0].runs == 5
    assert options(WARMUP % ("", "zero_data: true")).warmup[0].runs == 1
    assert "count must be at most" in refusal(WARMUP % ("count: 10001", "zero_data: true"))


@honours("model_warmup.inputs.data_type")
def warmup_data_type(_: Path) -> None:
    text = (WARMUP % ("", "zero_data: true")).replace("TYPE_FP32", "TYPE_STRING")
    assert options(text).warmup[0].inputs["x"].tolist() == [[b"", b"", b""]]
    other = text.replace("TYPE_STRING", "TYPE_INT8", 1)
    assert refusal(other) == ("model_warmup 'w': input 'x' must be INT8 [-1, 3], got BYTES [1, 3]")


@honours("model_warmup.inputs.dims")
def warmup_dims(_: Path) -> None:
    text = (WARMUP % ("", "zero_data: true")).replace("dims: [3]", "dims: [-1]", 1)
    assert options(text).warmup[0].inputs["x"].shape == (1, 3)
    assert "negative dimension" in refusal(text.replace("dims: [3]", "dims: [-1]"))
    assert "takes more than" in refusal(text.replace("dims: [3]", "dims: [1000000000]"))
    fixed = WARMUP % ("", "zero_data: true")
    assert "must be FP32 [-1, 2]" in refusal(fixed.replace("dims: [3]", "dims: [2]", 1))


@honours("model_warmup.inputs.zero_data")
def zero_data(_: Path) -> None:
    array = options(WARMUP % ("", "zero_data: false")).warmup[0].inputs["x"]
    assert array.dtype == np.float32
    assert array.tolist() == [[0, 0, 0]]
    assert refusal(WARMUP % ("", "")) == (
        "model_warmup 'w': input 'x' needs zero_data, random_data or input_data_file"
    )


@honours("model_warmup.inputs.random_data")
def random_data(_: Path) -> None:
    text = WARMUP % ("batch_size: 4", "random_data: true")
    array = options(text).warmup[0].inputs["x"]
    assert len(set(array.ravel().tolist())) > 1
    assert 0 <= array.min() <= array.max() <= 1
    for dtype in ("BOOL", "UINT8", "INT64", "FP16", "BF16", "FP64", "STRING"):
        array = options(text.replace("FP32", dtype)).warmup[0].inputs["x"]
        assert array.shape == (4, 3)


@honours("model_warmup.inputs.input_data_file")
def input_data_file(folder: Path) -> None:
    text = WARMUP % ("batch_size: 2", "input_data_file: 'row'")
    path = folder / "warmup/row"
    assert "input 'x' 'row': No such file" in refusal(text, folder)
    path.parent.mkdir()
    path.write_bytes(np.array([1, 2, 3], dtype=np.float32).tobytes())
    array = options(text, folder).warmup[0].inputs["x"]
    assert array.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert array.flags.c_contiguous
    strings = text.replace("TYPE_FP32", "TYPE_STRING").replace("[3]", "[1]")
    path.write_bytes(b"\2\0\0\0ab")
    assert options(strings, folder).warmup[0].inputs["x"].tolist() == [[b"ab"], [b"ab"]]
    assert "needs 12 bytes, got 6" in refusal(text, folder)
    assert "must be a path inside" in refusal(text.replace("'row'", "'../row'"), folder)


def test_options_warn_about_harmless_fields_and_refuse_the_refused() -> None:
    assert options("response_cache { enable: true }").warnings == (
        "response_cache.enable is ignored: every request is computed",
    )
    assert options("").warnings == ()
    with pytest.raises(RepositoryError, match="models with sequences are not served"):
        options("sequence_batching {}")


def test_every_honoured_row_has_a_check() -> None:
    assert CHECKS.keys() == {path for path, rule in FIELDS.items() if rule.fate is Fate.HONOURED}


@pytest.mark.parametrize("path", sorted(CHECKS))
def test_honoured(path: str, tmp_path: Path) -> None:
    CHECKS[path](tmp_path)
