# SPDX-License-Identifier: Apache-2.0
"""Reading configurations: text format, JSON, and everything that is neither."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.model_config import (
    CONFIG_BYTES_MAX,
    parse_json,
    parse_text,
    read_config,
)
from thirdrail_server.repository.options import model_options

GOOD = b"""
name: "m"
max_batch_size: 8  # rows
input [{ name: "x" data_type: TYPE_FP32 dims: [ -1, 16 ] }]
output { name: "y", data_type: TYPE_STRING, dims: 1 }
dynamic_batching { preferred_batch_size: [ 4, 8 ] default_queue_policy { max_queue_size: 7 } }
parameters { key: "intra_op_thread_count" value { string_value: "2" } }
model_warmup { name: "w" batch_size: 1 inputs { key: "x" value {
  data_type: TYPE_FP32 dims: [ 1, 16 ] zero_data: true } } }
version_policy { specific { versions: [1, 2] } }
instance_group [{ count: 2 kind: KIND_CPU }]
"""


def refusal_of(read: Callable[..., ModelConfig], *arguments: object) -> str:
    """The text of the declared error, or nothing; other errors are let through."""
    try:
        use(read(*arguments))
    except RepositoryError as error:
        return str(error)
    return ""


def use(config: ModelConfig) -> None:
    """All that reads a configuration before an engine is involved."""
    model_options(config, Path("/nowhere"), queue_requests_max=10)


def test_reads_the_text_format() -> None:
    config = parse_text(GOOD, "m")
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [-1, 16]
    assert config.dynamic_batching.default_queue_policy.max_queue_size == 7


def test_reads_the_file_of_a_model_folder(repository: Any) -> None:
    repository.write("m/1/model.onnx")
    assert read_config(repository.model("m")) is None
    repository.write("m/config.pbtxt", GOOD)
    assert read_config(repository.model("m")) == parse_text(GOOD, "m")


def test_the_name_may_be_left_out_but_not_differ() -> None:
    assert parse_text(b"max_batch_size: 1", "m").name == "m"
    assert parse_json(b"{}", "m").name == "m"
    expected = r'is for model "other", expected "m" as its folder is called'
    with pytest.raises(RepositoryError, match=expected):
        parse_text(b'name: "other"', "m")
    with pytest.raises(RepositoryError, match=expected):
        parse_json(b'{"name": "other"}', "m")


def test_an_unknown_field_in_json_is_told_with_a_likely_one() -> None:
    with pytest.raises(RepositoryError, match="Did you mean 'max_batch_size'"):
        parse_json(b'{"max_batchsize": 1}', "m")


def test_an_error_that_quotes_an_error_is_no_error() -> None:
    quoted = b"""max_batch_size: ' : Message type "a.B" has no field named "c"'"""
    with pytest.raises(RepositoryError, match="Couldn't parse integer"):
        parse_text(quoted, "m")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'name: "m"\nmax_batch: 1', r'c: line 2, column 1: .*no field named "max_batch"'),
        (b"max_batch_sise: 1", r"c: line 1, .*\. Did you mean 'max_batch_size'\?$"),
        (b"input { datatype: TYPE_FP32 }", r"c: line 1, .*\. Did you mean 'data_type'\?$"),
        (b"nothing_like_it: 1", r'c: line 1, .*no field named "nothing_like_it"\.$'),
        (b"max_batch_size: many", r"c: line 1, column 17: .*Couldn't parse integer: many"),
        (b"input {\n  dims: [ 1, 2\n", r"c: line \d, column \d+: "),
        (b"max_batch_size: 99999999999", r"c: line 1, column 17: .*out of range"),
        (b"max_batch_size: 1 max_batch_size: 2", r"c: line 1, .*multiple"),
        (b"input { data_type: TYPE_FP31 }", r"c: line 1, .*TYPE_FP31"),
        (b"[com.example.ext]: 1", r"c: line 1, column \d+: "),
        (b'name: "\\377"', r"c: "),
        (b'name: "\xff"', r"c is not UTF-8 text: byte 7 is wrong"),
        (b"", r"c is empty; without it, names and shapes are read from the model file"),
        (b" \n\t", r"c is empty"),
        (b"\x00\x00", r"c: "),
    ],
)
def test_says_where_a_text_is_wrong(text: bytes, expected: str) -> None:
    with pytest.raises(RepositoryError, match=expected):
        parse_text(text, "m", "c")


def test_every_truncation_is_read_or_refused() -> None:
    for length in range(len(GOOD)):
        refusal = refusal_of(parse_text, GOOD[:length], "m")
        assert not refusal or refusal.startswith("config.pbtxt")


@pytest.mark.parametrize("parse", [parse_text, parse_json])
def test_the_size_is_bounded(parse: Any) -> None:
    with pytest.raises(RepositoryError, match=f"larger than {CONFIG_BYTES_MAX} bytes"):
        parse(b" " * (CONFIG_BYTES_MAX + 1), "m")


def test_errors_do_not_repeat_the_input() -> None:
    for parse in (parse_text, parse_json):
        with pytest.raises(RepositoryError) as caught:
            parse(b"x" * 100_000, "m")
        assert len(str(caught.value)) < 600


def test_reads_json_with_numbers_as_strings() -> None:
    data = {
        "max_batch_size": "16",
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1", 3]}],
        "dynamic_batching": {"max_queue_delay_microseconds": "100"},
        "parameters": {"a": {"string_value": "b"}},
    }
    config = parse_json(json.dumps(data).encode(), "m")
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [-1, 3]
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert config.parameters["a"].string_value == "b"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"max_batch": 1}', r'no field named "max_batch"'),
        (b'{"max_batch_size": "many"}', r"max_batch_size"),
        (b'{"max_batch_size": 1.5}', r"max_batch_size"),
        (b'{"max_batch_size": 1e400}', r"max_batch_size"),
        (b"{", r"the JSON configuration: "),
        (b"[]", r"the JSON configuration is not a JSON object"),
        (b"1", r"the JSON configuration is not a JSON object"),
        (b'"text"', r"the JSON configuration is not a JSON object"),
        (b"null", r"the JSON configuration is not a JSON object"),
        (b"", r"the JSON configuration is empty"),
        (b"\xff", r"the JSON configuration is not UTF-8 text"),
        (b'{"input":' + b"[" * 100_000, r"the JSON configuration: .*nested too deeply"),
        (b'{"name": "\\ud800"}', r"the JSON configuration: "),
        (b'{"input": {"a": 1}}', r"the JSON configuration: "),
        (b'{"max_batch_size": %s}' % (b"9" * 5000), r"the JSON configuration: "),
    ],
)
def test_says_what_is_wrong_with_json(text: bytes, expected: str) -> None:
    with pytest.raises(RepositoryError, match=expected):
        parse_json(text, "m")


# Words of the language make far more of the random texts parse than random bytes would.
WORDS = st.sampled_from(
    [word for word in GOOD.decode().split() if word != "#"]
    + ["-1", "0", "99999999999999999999", '""', "{", "}", "[", "]", ":", ",", "true", "KIND_GPU"]
    + [f"{field.name}: 1" for field in ModelConfig.DESCRIPTOR.fields]
    + [f"{field.name} {{" for field in ModelConfig.DESCRIPTOR.fields]
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.lists(WORDS, max_size=30).map(" ".join)))
def test_random_input_is_read_or_refused(text: bytes | str) -> None:
    data = text.encode() if isinstance(text, str) else text
    for parse in (parse_text, parse_json):
        assert refusal_of(parse, data, "m").isprintable()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD)), st.integers(0, 40), WORDS), max_size=4),
)
def test_mutated_configurations_are_read_or_refused(cuts: list[tuple[int, int, str]]) -> None:
    text = GOOD.decode()
    for start, length, word in cuts:
        text = text[:start] + word + text[start + length :]
    assert refusal_of(parse_text, text.encode(), "m").isprintable()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(sorted(ModelConfig.DESCRIPTOR.fields_by_name)), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_random_json_is_read_or_refused(value: object) -> None:
    assert refusal_of(parse_json, json.dumps(value).encode(), "m").isprintable()


# Any wire-format ModelConfig, beyond what a text says easily.
@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_random_messages_are_used_or_refused(data: bytes) -> None:
    try:
        config = ModelConfig.FromString(data)
    except DecodeError:
        return
    assert refusal_of(lambda: config).isprintable()
