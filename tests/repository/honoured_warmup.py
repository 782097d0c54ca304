# SPDX-License-Identifier: Apache-2.0
"""Checks of honoured fields: warm-up requests."""

from pathlib import Path

import numpy as np

from repository.honoured import honours, options, refusal

WARMUP = """max_batch_size: 4
    input [{ name: 'x' data_type: TYPE_FP32 dims: [3] }]
    model_warmup { name: 'w' %s inputs { key: 'x' value {
        data_type: TYPE_FP32 dims: [3] %s } } }"""


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
