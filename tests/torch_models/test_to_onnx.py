# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""PyTorch's files as ONNX: the same results, names that say something, errors that help."""

import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from thirdrail_engines.plans import BuildError, BuildFault, Profile, ShapeRange
from thirdrail_engines.torch_sources import to_onnx

pytestmark = pytest.mark.needs_torch

SaveModel = Callable[..., Path]


def ignore(*_: Any) -> None:
    pass


def dims(path: Path) -> dict[str, list[Any]]:
    graph = onnx.load(path).graph
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def assert_agrees(path: Path, feed: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """The ONNX file's outputs have these names, in this order, and these values."""
    session = ort.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == list(expected)
    arrays = {name: tensor.numpy() for name, tensor in feed.items()}
    for found, (name, wanted) in zip(session.run(None, arrays), expected.items(), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5, err_msg=name)


def test_several_inputs_and_outputs_with_an_open_batch(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    module = TwoInTwoOut()
    examples = (torch.randn(3, 5, 8), torch.ones(3, 5, 1))
    axes = ({0: "batch", 1: "time"}, {0: "batch", 1: "time"})
    told: list[tuple[str, int, int]] = []
    path = to_onnx(
        save_exported(module, examples, axes), onnx_folder, lambda *step: told.append(step)
    )
    assert path == onnx_folder / "model.onnx"
    assert told == [("torch to ONNX", done, 4) for done in range(5)]
    assert dims(path) == {
        "words": ["words_dim0", "words_dim1", 8],
        "mask": ["words_dim0", "words_dim1", 1],
        "each": ["words_dim0", "words_dim1", 4],
        "total": ["words_dim0", 4],
    }
    for batch, time in ((1, 1), (3, 5), (64, 17)):
        words, mask = torch.randn(batch, time, 8), torch.rand(batch, time, 1)
        assert_agrees(path, {"words": words, "mask": mask}, module(words, mask))


def test_the_names_of_open_dimensions_are_the_same_in_every_conversion(
    save_exported: SaveModel, tmp_path: Path
) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    files = []
    for number, (batch, time) in enumerate((("batch", "time"), ("a", "b"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        axes = {0: batch, 1: time}
        examples = (torch.randn(3, 5, 8), torch.ones(3, 5, 1))
        source = save_exported(TwoInTwoOut(), examples, (axes, axes))
        files.append(dims(to_onnx(source, folder, ignore)))
    assert files[0] == files[1]
    assert files[0]["words"] == ["words_dim0", "words_dim1", 8]


def test_convolutions(save_exported: SaveModel, onnx_folder: Path) -> None:
    import torch

    from support.torch_modules import Convolutions

    module = Convolutions()
    source = save_exported(module, (torch.randn(2, 3, 32, 32),), ({0: "batch"},))
    path = to_onnx(source, onnx_folder, ignore)
    image = torch.randn(7, 3, 32, 32)
    assert_agrees(path, {"image": image}, {"output": module(image)})


def test_an_lstm_with_its_state_as_input_and_output(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    from support.torch_modules import Recurrent

    module = Recurrent()
    examples = (torch.randn(2, 5, 4), torch.randn(2, 4, 6), torch.randn(2, 4, 6))
    source = save_exported(module, examples, ({0: "batch"}, {0: "batch"}, {0: "batch"}))
    path = to_onnx(source, onnx_folder, ignore)
    feed = (torch.randn(9, 5, 4), torch.randn(9, 4, 6), torch.randn(9, 4, 6))
    y, state, cell = module(*feed)
    assert_agrees(
        path,
        dict(zip(("x", "state", "cell"), feed, strict=True)),
        {"output_0": y, "output_1": state, "output_2": cell},
    )


def test_whole_numbers_and_attention(save_exported: SaveModel, onnx_folder: Path) -> None:
    import torch

    from support.torch_modules import Tokens

    module = Tokens()
    source = save_exported(module, (torch.randint(50, (2, 7)),), ({0: "batch", 1: "length"},))
    path = to_onnx(source, onnx_folder, ignore)
    tokens = torch.randint(50, (4, 11))
    assert_agrees(path, {"tokens": tokens}, module(tokens))


def test_an_output_that_nobody_knows_the_size_of(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    from support.torch_modules import Picks

    path = to_onnx(save_exported(Picks(), (torch.randn(9),), ({0: "n"},)), onnx_folder, ignore)
    assert dims(path) == {"x": ["x_dim0"], "output": ["output_dim0"]}
    x = torch.tensor([1.0, -1, 2])
    assert_agrees(path, {"x": x}, {"output": x[x > 0]})


def test_an_output_with_the_name_of_an_input_gets_another_one(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    class Renamed(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"x": x + 1, "none": None, "y": {"low": x - 1}}

    path = to_onnx(save_exported(Renamed(), (torch.ones(2),)), onnx_folder, ignore)
    x = torch.ones(2)
    assert_agrees(path, {"x": x}, {"x_out": x + 1, "y_low": x - 1})


def test_arguments_that_are_nested_named_or_constant(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    from support.torch_modules import Nested

    left, right, scale = torch.randn(2), torch.randn(2), torch.randn(2)
    arguments = ({"left": left, "right": [right]}, True)
    source = save_exported(Nested(), arguments, None, {"scale": scale})
    path = to_onnx(source, onnx_folder, ignore)
    feed = {"pair_left": left, "pair_right_0": right, "scale": scale}
    assert_agrees(path, feed, {"output": (left - right) * scale})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Counting", "model.pt2: each run changes 'count'; one request would then change"),
        ("InPlace", "model.pt2: each run changes 'x'; one request"),
        ("Constant", "model.pt2: output 1 is always 3 and no tensor, return tensors only"),
    ],
)
def test_programs_that_cannot_be_served(
    save_exported: SaveModel, onnx_folder: Path, name: str, expected: str
) -> None:
    import torch

    from support import torch_modules

    source = save_exported(getattr(torch_modules, name)(), (torch.ones(2),))
    assert refused(source, onnx_folder).startswith(expected)


def test_a_size_among_the_results_is_no_tensor(save_exported: SaveModel, onnx_folder: Path) -> None:
    """The names of those behind it would be one place off."""
    import torch

    class Sizes(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.sum(), x.shape[0], x * 2

    source = save_exported(Sizes(), (torch.ones(2, 3),), ({0: "rows"},))
    assert refused(source, onnx_folder).startswith(
        "model.pt2: output 1 is a number made of sizes and no tensor, return tensors only"
    )


def test_an_operator_that_onnx_has_no_word_for(save_exported: SaveModel, onnx_folder: Path) -> None:
    import torch

    from support.torch_modules import Special

    text = refused(save_exported(Special(), (torch.ones(2),)), onnx_folder)
    assert text.startswith("model.pt2: PyTorch cannot write it as ONNX: ")
    assert "bessel_j0" in text
    assert "\x1b" not in text
    assert "\n" not in text


def test_a_program_that_answers_differently_each_time(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    class Noisy(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"low": x - 1, "high": x + torch.rand_like(x)}

    text = refused(save_exported(Noisy(), (torch.ones(64),)), onnx_folder)
    assert "do not agree on the example inputs in it: output 'high' differs by " in text
    assert "Was model.eval() called before it was exported?" in text


def test_a_conversion_that_is_wrong_is_seen(
    monkeypatch: pytest.MonkeyPatch, save_exported: SaveModel, onnx_folder: Path
) -> None:
    """As if the exporter had taken one operator for another."""
    import torch

    from support.torch_modules import TwoInTwoOut
    from thirdrail_engines.torch_sources import to_onnx as module

    def damage(model: Any) -> None:
        node = next(node for node in model.graph.all_nodes() if node.op_type == "Relu")
        node.op_type = "Abs"

    monkeypatch.setattr(sys.modules[module.__module__], "_name_dimensions", damage)
    source = save_exported(TwoInTwoOut(), (torch.randn(3, 5, 8), torch.ones(3, 5, 1)))
    assert "do not agree on the example inputs in it: output 'each'" in refused(source, onnx_folder)


def test_bf16_is_written_though_not_compared(save_exported: SaveModel, onnx_folder: Path) -> None:
    import torch

    from support.torch_modules import TwoInTwoOut

    examples = (torch.randn(3, 5, 8).bfloat16(), torch.ones(3, 5, 1).bfloat16())
    path = to_onnx(save_exported(TwoInTwoOut().bfloat16(), examples), onnx_folder, ignore)
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16


def test_complex_numbers_are_no_tensors_of_ours(
    save_exported: SaveModel, onnx_folder: Path
) -> None:
    import torch

    class Complex(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.fft.fft(x)

    text = refused(save_exported(Complex(), (torch.ones(2),)), onnx_folder)
    assert "tensor 'output' is a torch.complex64, expected one of BOOL, UINT8" in text


def test_a_program_that_means_nothing(save_exported: SaveModel, onnx_folder: Path) -> None:
    import torch

    from support.torch_modules import Identity

    source = save_exported(Identity(), (torch.ones(2),))
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for content in (b"{}", b"", b"[" * 100_000, members["model/models/model.json"][:-100]):
        with zipfile.ZipFile(source, "w") as archive:
            for name, whole in members.items():
                archive.writestr(name, content if name.endswith("model.json") else whole)
        assert "cannot read it: " in refused(source, onnx_folder)


def test_no_pickle_in_the_example_inputs_runs(
    save_exported: SaveModel, onnx_folder: Path, tmp_path: Path
) -> None:
    """torch.export.load would try without weights_only when weights_only fails."""
    import torch

    from support.torch_modules import Identity

    trace = tmp_path / "ran"

    class Attack:
        def __reduce__(self) -> Any:
            return Path.touch, (trace,)

    source = save_exported(Identity(), (torch.ones(2),))
    torch.save(((Attack(),), {}), tmp_path / "inputs.pt")
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, whole in members.items():
            is_inputs = "sample_inputs" in name
            archive.writestr(name, (tmp_path / "inputs.pt").read_bytes() if is_inputs else whole)
    assert "cannot read it: " in refused(source, onnx_folder)
    assert not trace.exists()


def test_torchscript_with_the_shapes_of_a_profile(onnx_folder: Path, tmp_path: Path) -> None:
    import torch

    from support.torch_modules import Convolutions, save_script

    module = Convolutions()
    source = save_script(tmp_path / "model.pt", module)
    shapes = ShapeRange((1, 3, 32, 32), (2, 3, 32, 32), (8, 3, 32, 32))
    path = to_onnx(source, onnx_folder, ignore, [Profile({"image": shapes})])
    assert dims(path)["image"] == ["image_dim0", 3, 32, 32]
    image = torch.randn(7, 3, 32, 32)
    assert_agrees(path, {"image": image}, {"output": module(image)})


def test_torchscript_without_shapes_or_with_wrong_ones(onnx_folder: Path, tmp_path: Path) -> None:
    from support.torch_modules import Convolutions, Tokens, save_script

    source = save_script(tmp_path / "model.pt", Convolutions())
    text = refused(source, onnx_folder)
    assert "does not say which shapes it takes" in text
    assert 'key: "profile.0.image"' in text
    assert "torch.export.save" in text
    shape = (2, 4, 32, 32)
    wrong = Profile({"image": ShapeRange(shape, shape, shape)})
    text = refused(source, onnx_folder, wrong)
    assert "to have 3 channels, but got 4 channels" in text
    tokens = save_script(tmp_path / "tokens.pt", Tokens())
    row = (2, 4)
    text = refused(tokens, onnx_folder, Profile({"tokens": ShapeRange(row, row, row)}))
    assert "Its inputs were taken to be FP32" in text


def test_modules_and_state_dicts_are_refused_unread(onnx_folder: Path, tmp_path: Path) -> None:
    import torch

    from support.torch_modules import Identity, Views

    for saved in (Identity(), Views().state_dict()):
        torch.save(saved, tmp_path / "model.pt")
        text = refused(tmp_path / "model.pt", onnx_folder)
        assert text.startswith("model.pt: written by torch.save: a pickled module or a state dict")


def refused(source: Path, folder: Path, *profiles: Profile) -> str:
    with pytest.raises(BuildError) as caught:
        to_onnx(source, folder, ignore, profiles)
    assert caught.value.fault is BuildFault.REFUSED
    return str(caught.value)
