# SPDX-License-Identifier: Apache-2.0
"""PyTorch reads a `.pt2` file, or says why not in words that help. Imports torch."""

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export.pt2_archive._package import load_pt2

from thirdrail_engines.plans import BuildError, BuildFault
from thirdrail_engines.torch_sources.quiet import quiet_exporter

TEXT_CHARS_MAX = 1000
_PROGRAM = "models/model.json"
_CHUNK_BYTES = 1 << 20
_TAIL_BYTES = 200

# What PyTorch says -> who is to do what. Groups of the pattern fill the braces.
_ADVICE = (
    (
        r"failed to resolve torch\.ops\.(\w+)\.(\w+)\S* to an operator",
        "it uses the operator {0}::{1}, which is not part of PyTorch {version}: code that defines "
        "operators is not loaded, so write the model with PyTorch's own",
    ),
    (
        r"Deserializing (\S+) in pytree is not registered",
        "it takes or returns the class {0}, which only its own code knows: use dictionaries, lists "
        "and tuples",
    ),
    (
        r"schema version .* does not match",
        "the format is not that of PyTorch {version}: save it again with that version",
    ),
)


def read_program(path: Path) -> Any:
    """The torch.export.ExportedProgram in a file that `kind_of` has looked at. Raises BuildError
    REFUSED."""
    # Else what is not read with weights_only is read without it. Set for good: nothing in our
    # processes is ever to be unpickled freely.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with quiet_exporter():
            # torch.export.load is this, but for telling the log what went wrong, and the caller
            # that something did.
            return load_pt2(path).exported_programs["model"]
    except Exception as error:  # its parts raise whatever they happen to
        reason = _advised(tidy(error))
    writer = _writer(path)
    by = f" (written by PyTorch {writer})" if writer not in ("", torch.__version__) else ""
    raise refusal(path, f"PyTorch {torch.__version__} cannot read it{by}: {reason}")


def refusal(path: Path, text: str) -> BuildError:
    return BuildError(BuildFault.REFUSED, f"{path.name}: {text}")


def tidy(error: BaseException) -> str:
    """What torch said first, on one line: without advice, colours and traces."""
    while error.__cause__ is not None:  # ends: causes are a chain that Python keeps free of rings
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    inner = re.findall(r"(?m)^[\w.]*Error: (.+)$", text)  # below the trace of a script
    first = inner[-1] if inner else " ".join(text.split("\n\n")[0].split())
    return (first or type(error).__name__)[:TEXT_CHARS_MAX]


def _advised(text: str) -> str:
    for pattern, advice in _ADVICE:
        found = re.search(pattern, text)
        if found:
            return advice.format(*found.groups(), version=torch.__version__)
    return text


def _writer(path: Path) -> str:
    """The version of PyTorch that wrote the file; "" where that is not known."""
    with zipfile.ZipFile(path) as archive:
        member = next((n for n in archive.namelist() if n.endswith(f"/{_PROGRAM}")), None)
        if member is None:
            return ""
        tail = b""
        with archive.open(member) as file:
            while chunk := file.read(_CHUNK_BYTES):  # ends: with the file
                tail = (tail + chunk)[-_TAIL_BYTES - len(chunk) :]
                found = re.search(rb'"torch_version": "([\w.+-]{1,60})"', tail)
                if found:
                    return found[1].decode()
    return ""
