# SPDX-License-Identifier: Apache-2.0
"""Configuration texts -> ModelConfig: config.pbtxt, and the JSON of KServe's load call.

Only the reading is here. What the fields mean for us is judged by fields.py and options.py.
"""

import difflib
import json
import re

from google.protobuf import json_format, text_format

from thirdrail_server.inference.grpc_service_pb2 import ModelConfig
from thirdrail_server.repository.errors import RepositoryError
from thirdrail_server.repository.layout import CONFIG_FILENAME, ModelFolder
from thirdrail_server.repository.paths import read_bounded

CONFIG_BYTES_MAX = 1 << 20
_CAUSE_CHARS_MAX = 300  # parsers first quote the line, which may be a megabyte
_UNKNOWN_FIELD = re.compile(r'Message type "([\w.]+)" has no field named "(\w+)"')


def read_config(folder: ModelFolder) -> ModelConfig | None:
    """A model folder's config.pbtxt; None where there is none. Raises RepositoryError."""
    if folder.config_path is None:
        return None
    where = f"{folder.name}/{CONFIG_FILENAME}"
    return parse_text(read_bounded(folder.config_path, CONFIG_BYTES_MAX, where), folder.name, where)


def parse_text(data: bytes, name: str, where: str = CONFIG_FILENAME) -> ModelConfig:
    """The ModelConfig of a text in protobuf text format, for the model `name`.

    Raises RepositoryError with line and column when it is not UTF-8, does not parse, or names
    another model.
    """
    text = _decoded(data, where)
    config = ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        place = f"line {line}, column {column or 1}: " if line else ""
        raise RepositoryError(f"{where}: {place}{_cause(error)}") from None
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise RepositoryError(
            f"{where}: not a ModelConfig in text format: {_cause(error)}"
        ) from None
    return _named(config, name, where)


def parse_json(data: bytes, name: str, where: str = "the JSON configuration") -> ModelConfig:
    """The ModelConfig of a JSON object, for the model `name`. Numbers may come as strings.

    Raises RepositoryError when it is not such an object, has unknown fields, or names another
    model.
    """
    text = _decoded(data, where)
    if not text.lstrip().startswith("{"):
        raise RepositoryError(f"{where} is not a JSON object")
    config = ModelConfig()
    try:
        json_format.Parse(text, config)
    except json_format.ParseError as error:
        raise RepositoryError(f"{where}: {_cause(error)}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RepositoryError(f"{where}: not a ModelConfig in JSON: {_cause(error)}") from None
    return _named(config, name, where)


def _decoded(data: bytes, where: str) -> str:
    if len(data) > CONFIG_BYTES_MAX:
        raise RepositoryError(f"{where} is larger than {CONFIG_BYTES_MAX} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{where} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text.strip():
        raise RepositoryError(
            f"{where} is empty; without it, names and shapes are read from the model file"
        )
    return text


def _cause(error: Exception) -> str:
    if isinstance(error, RecursionError) or isinstance(error.__context__, RecursionError):
        return "it is nested too deeply"  # each Python says that in other words
    cause = " ".join(str(error).split())
    if isinstance(error, text_format.ParseError):
        cause = cause.partition(" : ")[2] or cause  # its own "line:column : " prefix
    advice = _advice(cause)
    if len(cause) > _CAUSE_CHARS_MAX:
        cause = f"{cause[: _CAUSE_CHARS_MAX // 3]} ... {cause[-_CAUSE_CHARS_MAX * 2 // 3 :]}"
    return cause + advice


def _advice(cause: str) -> str:
    """The field that was perhaps meant by an unknown one."""
    unknown = _UNKNOWN_FIELD.search(cause)
    if unknown is None:
        return ""
    try:
        message = ModelConfig.DESCRIPTOR.file.pool.FindMessageTypeByName(unknown[1])
    except KeyError:  # the parser did not say that, it quoted it
        return ""
    close = difflib.get_close_matches(unknown[2], message.fields_by_name, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def _named(config: ModelConfig, name: str, where: str) -> ModelConfig:
    if config.name and config.name != name:
        raise RepositoryError(
            f"{where}: the configuration is for model {json.dumps(config.name[:200])}, "
            f"expected {json.dumps(name)} as its folder is called"
        )
    config.name = name
    return config
