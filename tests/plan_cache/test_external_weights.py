# SPDX-License-Identifier: Apache-2.0
"""Which files a model keeps its weights in: all that onnx itself would read, and nothing that lies
elsewhere."""

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from thirdrail_engines import ModelFileError
from thirdrail_engines.plan_cache.external_weights import weights_beside


def external(location: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), location)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for name, value in (("offset", "0"), ("location", location), ("length", "8")):
        entry = tensor.external_data.add()
        entry.key, entry.value = name, value
    return tensor


def graph(*nodes: onnx.NodeProto, weights: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, "g", [], [], weights)


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=external(location))


def everywhere() -> onnx.ModelProto:
    """A model with external tensors in each place that can hold one."""
    inner = graph(constant("in/subgraph"), weights=(external("initializer-of-subgraph"),))
    branches = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=graph())
    many = helper.make_node("Many", [], ["z"])
    attribute = many.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS)
    attribute.tensors.append(external("tensors"))
    attribute = many.attribute.add(name="graphs", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.append(graph(weights=(external("graphs"),)))
    attribute = many.attribute.add(name="sparse", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(external("sparse-attribute"))
    attribute = many.attribute.add(name="sparses", type=onnx.AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().indices.CopyFrom(external("sparse-attributes"))
    model = helper.make_model(
        graph(branches, many, constant("node"), weights=(external("initializer"),) * 2)
    )
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("sparse-values"))
    sparse.indices.CopyFrom(external("sparse-indices"))
    function = model.functions.add(name="f", domain="d")
    function.node.append(constant("function"))
    function.attribute_proto.add(name="a").t.CopyFrom(external("default-of-function"))
    training = model.training_info.add()
    training.initialization.CopyFrom(graph(constant("initialization")))
    training.algorithm.CopyFrom(graph(constant("algorithm")))
    return model


def test_every_place_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(everywhere().SerializeToString())
    assert weights_beside(path) == sorted(
        [
            "algorithm",
            "default-of-function",
            "function",
            "graphs",
            "in/subgraph",
            "initialization",
            "initializer",
            "initializer-of-subgraph",
            "node",
            "sparse-attribute",
            "sparse-attributes",
            "sparse-indices",
            "sparse-values",
            "tensors",
        ]
    )


def test_texts_elsewhere_are_no_places(tmp_path: Path) -> None:
    model = helper.make_model(graph(), doc_string="location", producer_name="location")
    helper.set_model_props(model, {"location": "nowhere"})
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert weights_beside(path) == []


def test_large_tensors_are_skipped(tmp_path: Path) -> None:
    data = numpy_helper.from_array(np.zeros(1 << 20, np.float32), "large")
    path = tmp_path / "model.onnx"
    model = helper.make_model(graph(weights=(data, external("a"), data, external("b"))))
    path.write_bytes(model.SerializeToString())
    assert weights_beside(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "model.plan"])
def test_other_formats_keep_nothing_beside(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(everywhere().SerializeToString())
    assert weights_beside(tmp_path / name) == []


@pytest.mark.parametrize("place", ["/etc/passwd", "../weights", "a/../../b", "", "a\0b"])
def test_places_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph(constant(place))).SerializeToString())
    with pytest.raises(ModelFileError, match="expected a file in the model's own folder"):
        weights_beside(path)


def field(number: int, payload: bytes) -> bytes:
    length, rest = len(payload) & 0x7F, len(payload) >> 7
    size = bytes([length]) if not rest else bytes([length | 0x80, rest & 0x7F | 0x80, rest >> 7])
    return bytes([number << 3 | 2]) + size + payload


def test_zeros_are_refused_at_once(tmp_path: Path) -> None:
    """As of a file that was cut short on its way, and filled up. Each would be a field of its own:
    reading them took a minute for 300 MB."""
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, field(1, b"")) + bytes(100))
    with pytest.raises(ModelFileError, match="encoding is broken"):
        weights_beside(path)


def test_bottomless_models_are_refused(tmp_path: Path) -> None:
    deep = external("deep").SerializeToString()
    message = field(5, deep)  # a graph with an initializer
    for _ in range(60):
        message = field(1, field(5, field(6, message)))  # a graph with a node with a subgraph
    path = tmp_path / "model.onnx"
    path.write_bytes(field(7, message))
    with pytest.raises(ModelFileError, match="encoding is broken"):
        weights_beside(path)
    path.write_bytes(field(7, field(5, deep)))
    assert weights_beside(path) == ["deep"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_models_are_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    whole = bytearray(everywhere().SerializeToString())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    with contextlib.suppress(ModelFileError):
        weights_beside(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with contextlib.suppress(ModelFileError):
        weights_beside(path)
