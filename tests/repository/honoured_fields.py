# SPDX-License-Identifier: Apache-2.0
"""Checks of honoured fields: names, versions, tensors, places, engines."""

from pathlib import Path

import pytest

from repository.honoured import INPUT, compiled, honours, options, parse, refusal
from thirdrail.dtypes import BYTES
from thirdrail_engines.compile_options import EngineChoice
from thirdrail_engines.plans import Precision
from thirdrail_server.repository.device_choice import CPU, Device, devices_of
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.fields import check_fields
from thirdrail_server.repository.layout import model_file, scan
from thirdrail_server.repository.model_config import parse_text, read_config
from thirdrail_server.repository.versions import chosen

TENSORRTS = (EngineChoice.TENSORRT, EngineChoice.TENSORRT_RTX)  # by what is installed
GPUS = (Device("GPU-one"), Device("GPU-other"))


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
