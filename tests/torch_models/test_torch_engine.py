# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""What the torch engine does beyond the contract of all engines."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from thirdrail_engines import (
    Engine,
    EngineError,
    EngineInputError,
    EngineMemoryError,
    EngineOptions,
    ModelFileError,
)
from thirdrail_engines.engine import DeviceLost

pytestmark = pytest.mark.needs_torch

SaveModel = Callable[..., Path]
LoadProgram = Callable[..., Engine]


@pytest.fixture
def load_program(save_exported: SaveModel) -> Iterator[LoadProgram]:
    """load_program(module, examples, open_dims): the engine that runs it."""
    from thirdrail_engines.torch_engine import load_torch

    engines: list[Engine] = []

    def load_one(*program: Any, threads_max: int = 1) -> Engine:
        path = save_exported(*program)
        engines.append(load_torch(path, options=EngineOptions(threads_max)))
        return engines[-1]

    yield load_one
    for engine in engines:
        engine.close()


def shapes(engine: Engine) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (tensor.name, tensor.dtype.name, tensor.shape)
        for tensor in (*engine.spec.inputs, *engine.spec.outputs)
    ]


def test_the_spec_has_the_names_and_open_dimensions_of_the_program(
    load_program: LoadProgram,
) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    module = TwoInTwoOut()
    axes = {0: "batch", 1: "time"}
    engine = load_program(module, (torch.randn(3, 5, 8), torch.ones(3, 5, 1)), (axes, axes))
    assert shapes(engine) == [
        ("words", "FP32", (-1, -1, 8)),
        ("mask", "FP32", (-1, -1, 1)),
        ("each", "FP32", (-1, -1, 4)),
        ("total", "FP32", (-1, 4)),
    ]
    assert engine.spec.platform == "pytorch_exported"
    assert engine.spec.positional_inputs == frozenset()
    words, mask = torch.randn(9, 2, 8), torch.rand(9, 2, 1)
    expected = module(words, mask)
    answer = engine.run({"mask": mask.numpy(), "words": words.numpy()}, ["total", "each"], {})
    assert list(answer) == ["total", "each"]
    for name, array in answer.items():
        np.testing.assert_allclose(array, expected[name].detach().numpy(), rtol=1e-6)


def test_a_program_gives_the_same_as_its_onnx_form(
    save_exported: SaveModel, load_program: LoadProgram, onnx_folder: Path
) -> None:
    import onnxruntime as ort
    import torch

    from support.torch_modules import Recurrent
    from thirdrail_engines.torch_sources import to_onnx

    batch = {0: "batch"}
    program = (
        Recurrent(),
        (torch.randn(2, 5, 4), torch.randn(2, 4, 6), torch.randn(2, 4, 6)),
        (batch, batch, batch),
    )
    engine = load_program(*program)
    session = ort.InferenceSession(to_onnx(save_exported(*program), onnx_folder, lambda *_: None))
    random = np.random.default_rng(0)
    feed = {
        tensor.name: random.standard_normal((3, *tensor.shape[1:]), dtype=np.float32)
        for tensor in engine.spec.inputs
    }
    names = [tensor.name for tensor in engine.spec.outputs]
    assert names == [each.name for each in session.get_outputs()]
    answer = engine.run(feed, names, {})
    for name, expected in zip(names, session.run(names, feed), strict=True):
        np.testing.assert_allclose(answer[name], expected, atol=1e-5)


def test_a_shape_outside_of_what_was_exported_is_refused_in_words(
    load_program: LoadProgram,
) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    batch = {0: "batch"}
    engine = load_program(
        TwoInTwoOut(), (torch.randn(3, 5, 8), torch.ones(3, 5, 1)), (batch, batch)
    )
    words, mask = np.ones((2, 5, 8), np.float32), np.ones((2, 5, 1), np.float32)
    with pytest.raises(EngineError, match=r"input 'words' is float32 with the shape \[2, 4, 8\]"):
        engine.run({"words": words[:, :4], "mask": mask}, ["each"], {})
    with pytest.raises(EngineInputError, match="the model takes no such shape: it needs "):
        engine.run({"words": words, "mask": mask[:1]}, ["each"], {})
    with pytest.raises(EngineError, match="input 'mask' is absent"):
        engine.run({"words": words}, ["each"], {})
    with pytest.raises(EngineError, match="'no' is no output, expected each, total"):
        engine.run({"words": words, "mask": mask}, ["no"], {})
    assert engine.run({"words": words, "mask": mask}, ["each"], {})["each"].shape == (2, 5, 4)


def test_a_failing_operator_says_why_and_the_next_run_succeeds(load_program: LoadProgram) -> None:
    import torch

    from support.torch_modules import Tokens

    engine = load_program(Tokens(), (torch.randint(50, (2, 7)),), ({0: "batch"},))
    why = "the model cannot compute with these inputs: index out of range in self"
    with pytest.raises(EngineInputError, match=why):
        engine.run({"tokens": np.full((1, 7), 99)}, ["low"], {})
    assert engine.run({"tokens": np.full((1, 7), 49)}, ["low"], {})["low"].shape == (1, 16)


def test_no_memory_is_nobodys_fault(load_program: LoadProgram) -> None:
    import torch

    class Huge(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.expand(1 << 50) + 1

    engine = load_program(Huge(), (torch.randn(1),))
    with pytest.raises(EngineMemoryError, match=r"no memory for a run: .* 4503599627370496 bytes"):
        engine.run({"x": np.zeros(1, np.float32)}, ["output"], {})


def test_results_are_neither_the_inputs_nor_the_weights(load_program: LoadProgram) -> None:
    import torch

    from support.torch_modules import Views

    engine = load_program(Views(), (torch.ones(4),))
    assert [tensor.name for tensor in engine.spec.outputs] == ["same", "shaped", "weight"]
    x = np.arange(4, dtype=np.float32)
    for _ in range(2):
        answer = engine.run({"x": x}, ["same", "shaped", "weight"], {})
        assert answer["weight"].tolist() == [0, 1, 2]
        assert answer["shaped"].tolist() == [[0, 1], [2, 3]]
        for array in answer.values():
            assert not np.shares_memory(array, x)
            array[...] = 9


def test_as_many_results_as_nobody_knew_before(load_program: LoadProgram) -> None:
    import torch

    from support.torch_modules import Picks

    engine = load_program(Picks(), (torch.randn(9),), ({0: "n"},))
    assert shapes(engine)[1] == ("output", "FP32", (-1,))
    x = np.array([1, -1, 2, -2], np.float32)
    assert engine.run({"x": x}, ["output"], {})["output"].tolist() == [1, 2]


def test_arguments_that_are_nested_named_or_constant(load_program: LoadProgram) -> None:
    import torch

    from support.torch_modules import Nested

    module, examples = Nested(), ({"left": torch.ones(2), "right": [torch.ones(2)]}, True)
    engine = load_program(module, examples, None, {"scale": torch.ones(2)})
    names = [tensor.name for tensor in engine.spec.inputs]
    assert names == ["pair_left", "pair_right_0", "scale"]
    values = dict(zip(names, np.array([[5, 5], [2, 3], [10, 10]], np.float32), strict=True))
    assert engine.run(values, ["output"], {})["output"].tolist() == [30, 20]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Counting", "model.pt2: each run changes 'count'"), ("InPlace", "each run changes 'x'")],
)
def test_programs_with_state_are_refused(
    save_exported: SaveModel, name: str, expected: str
) -> None:
    import torch

    from support import torch_modules
    from thirdrail_engines.torch_engine import load_torch

    path = save_exported(getattr(torch_modules, name)(), (torch.ones(2),))
    with pytest.raises(ModelFileError, match=expected):
        load_torch(path, options=EngineOptions())


def test_what_this_engine_does_not_load(tmp_path: Path, save_exported: SaveModel) -> None:
    import torch

    from support.torch_modules import Identity
    from thirdrail_engines.torch_engine import load_torch

    with pytest.raises(ModelFileError, match=r"model\.pt2: no such file"):
        load_torch(tmp_path / "model.pt2", options=EngineOptions())
    with pytest.raises(ModelFileError, match=r"model\.pt: a TorchScript file does not say"):
        load_torch(tmp_path / "model.pt", options=EngineOptions())
    path = save_exported(Identity(), (torch.ones(2),))
    if not torch.cuda.is_available():
        with pytest.raises(ModelFileError, match="this PyTorch sees no CUDA device"):
            load_torch(path, options=EngineOptions(), device="cuda")


def test_each_engine_keeps_to_its_own_number_of_threads(load_program: LoadProgram) -> None:
    import torch

    class Wide(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x @ x

    seen: list[int] = []
    engines = [load_program(Wide(), (torch.ones(4, 4),), threads_max=count) for count in (1, 2)]

    def run() -> None:
        for engine in (*engines, *engines):
            engine.run({"x": np.ones((4, 4), np.float32)}, ["output"], {})
            seen.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [1, 2, 1, 2]


def test_others_run_while_it_computes(load_program: LoadProgram) -> None:
    import torch

    class Long(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x @ x

    engine = load_program(Long(), (torch.ones(3000, 3000),))
    x = np.ones((3000, 3000), np.float32)
    done = threading.Event()

    def run() -> None:
        engine.run({"x": x}, ["output"], {})
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    rounds = 0
    while not done.is_set():
        rounds += 1
        done.wait(0.001)
    thread.join()
    assert rounds > 10


def test_a_process_that_loads_onnx_models_never_imports_torch(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    opset = helper.make_opsetid("", 17)
    model = helper.make_model(graph, ir_version=10, opset_imports=[opset])
    onnx.save(model, tmp_path / "model.onnx")
    code = (
        "import sys; from pathlib import Path; import thirdrail_engines as e; "
        "e.load(Path(sys.argv[1]), options=e.EngineOptions()).engine.close(); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.onnx"], check=True, timeout=60)


def test_a_boolean_byte_of_255_ends_at_the_engine(load_program: LoadProgram) -> None:
    """Some of PyTorch's kernels, that of cat among them, hand such a byte on."""
    import torch

    class Twice(torch.nn.Module):
        def forward(self, keep: Any) -> Any:
            return torch.cat([keep, keep])

    engine = load_program(Twice(), (torch.ones(4, dtype=torch.bool),))
    keep = np.array([0, 1, 255, 2], np.uint8).view(np.bool_)
    answer = engine.run({"keep": keep}, ["output"], {})["output"]
    assert answer.view(np.uint8).tolist() == [0, 1, 1, 1, 0, 1, 1, 1]


def test_results_go_where_they_are_wanted_if_they_are_copied_at_all(
    load_program: LoadProgram,
) -> None:
    import torch

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"turned": x.t(), "added": x + 1}

    engine = load_program(Module(), (torch.randn(300, 400),))
    x = np.random.default_rng(0).random((300, 400), np.float32)
    into = {"turned": np.zeros((400, 300), np.float32), "added": np.zeros_like(x)}
    answer = engine.run({"x": x}, ["turned", "added"], into)
    assert answer["turned"] is into["turned"]
    assert (into["turned"] == x.T).all()
    assert answer["added"] is not into["added"]  # PyTorch's own memory: no copy was made
    assert (answer["added"] == x + 1).all()


@pytest.mark.parametrize("is_sticky", [True, False])
def test_an_error_that_answers_every_call_is_a_lost_device(
    load_program: LoadProgram, monkeypatch: pytest.MonkeyPatch, is_sticky: bool
) -> None:
    """There is no GPU here: what PyTorch would say of one is put in its mouth."""
    import torch

    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1

    def synchronize(device: Any) -> None:
        if is_sticky:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    engine: Any = load_program(Module(), (torch.randn(3),))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    engine._device = torch.device("cuda")
    with pytest.raises(DeviceLost if is_sticky else EngineError) as caught:
        engine.run({"x": np.zeros(3, np.float32)}, ["output"], {})
    if is_sticky:
        assert str(caught.value).startswith("the device was lost: CUDA error: an illegal memory")
