# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-subclassing-any=False
"""Small PyTorch models, and how they become files. Imports torch: for needs_torch tests only."""

import warnings
from pathlib import Path
from typing import Any

import torch


class TwoInTwoOut(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, words: Any, mask: Any) -> Any:
        hidden = torch.relu(self.linear(words)) * mask
        return {"each": hidden, "total": hidden.sum(1)}


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1, stride=2),
            torch.nn.BatchNorm2d(8),
            torch.nn.Hardswish(),
            torch.nn.Conv2d(8, 8, 3, padding=1, groups=8),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(8, 5),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.body(image), -1)


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(4, 6, batch_first=True, num_layers=2, bidirectional=True)

    def forward(self, x: Any, state: Any, cell: Any) -> Any:
        y, (state, cell) = self.lstm(x, (state.transpose(0, 1), cell.transpose(0, 1)))
        return y, state.transpose(0, 1), cell.transpose(0, 1)


class Tokens(torch.nn.Module):
    """Whole numbers in, and an attention over them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(tokens)
        y, _ = self.attention(x, x, x, need_weights=False)
        return {"low": y.amin(1), "high": y.amax(1)}


class ManyKinds(torch.nn.Module):
    """Types, sizes and memory of all kinds: computed, moved, an input as it is, a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Convolutions()

    def forward(self, image: Any, counts: Any, flags: Any) -> dict[str, Any]:
        return {
            "classes": self.body(image) + counts.sum(1, keepdim=True),
            "moved": counts.t(),
            "same": counts,
            "no": ~flags,
            "weight": self.body.body[6].weight,
        }


class Counting(torch.nn.Module):
    """Has state that each run changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.count: Any

    def forward(self, x: Any) -> Any:
        self.count.add_(1)
        return x + self.count


class InPlace(torch.nn.Module):
    """Writes to its caller's tensor."""

    def forward(self, x: Any) -> Any:
        x.mul_(2)
        return x.sum(-1)


class Views(torch.nn.Module):
    """Results that are their inputs' or their weights' own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(3.0))

    def forward(self, x: Any) -> Any:
        return {"same": x, "shaped": x.view(-1, 2), "weight": self.weight, "none": None}


class Constant(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1, 3


class Picks(torch.nn.Module):
    """As many results as there are positive elements: nobody knows before the run."""

    def forward(self, x: Any) -> Any:
        return x[x > 0]


class Special(torch.nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Any) -> Any:
        return torch.special.bessel_j0(x)


class Nested(torch.nn.Module):
    def forward(self, pair: Any, flag: bool, *, scale: Any) -> Any:
        return (pair["left"] - pair["right"][0]) * scale if flag else scale


class TakesNumber(torch.nn.Module):
    def forward(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x * count


class TakesList(torch.nn.Module):
    def forward(self, all: list[torch.Tensor]) -> torch.Tensor:  # noqa: A002
        return all[0]


class ReturnsDict(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x}


class Identity(torch.nn.Module):
    def forward(self, x: Any) -> Any:
        return x.clone()


def save_exported(
    path: Path,
    module: Any,
    examples: tuple[Any, ...],
    open_dims: Any = None,
    named: Any = None,
    size_min: int = 1,
) -> Path:
    """open_dims: per argument, axis -> name of a dimension; equal names are equal sizes.

    named: arguments by name, after `examples`.
    """
    torch.manual_seed(0)
    names = {name for each in open_dims or () for name in each.values()}
    dims = {name: torch.export.Dim(name, min=size_min, max=1 << 30) for name in names}
    shapes = None
    if open_dims is not None:
        shapes = tuple({axis: dims[name] for axis, name in each.items()} for each in open_dims)
    with warnings.catch_warnings():
        # torch's own LSTM keeps its weights in a list beside its parameters, which export notices.
        warnings.filterwarnings("ignore", "The tensor attributes? self.*_flat_weights", UserWarning)
        program = torch.export.export(module.eval(), examples, named, dynamic_shapes=shapes)
        torch.export.save(program, path)
    return path


def save_script(path: Path, module: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.", DeprecationWarning)
        torch.jit.script(module.eval()).save(str(path))
    return path
