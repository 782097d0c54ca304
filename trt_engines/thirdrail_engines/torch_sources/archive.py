# SPDX-License-Identifier: Apache-2.0
"""What a file in PyTorch's formats is, found out without PyTorch and without running any of it.

Both formats are zip archives below one folder. What torch.export.save writes has an
`archive_format` that says "pt2", programs under `models/` and tables of weights and constants under
`data/`; TorchScript has its sources under `code/`; torch.save has neither, only `data.pkl`. (Read
in torch/export/pt2_archive and torch/csrc/jit/serialization, torch 2.13.)

torch.export.load does more than its caller expects: a weight or constant that its table marks so is
unpickled, a library under `data/aotinductor` is loaded, and no checksum is looked at, so that a
flipped bit becomes a wrong weight. All of these are refused here, before torch sees the file.
"""

import json
import zipfile
import zlib
from collections.abc import Collection, Iterable
from enum import Enum, auto
from pathlib import Path
from typing import Any

from thirdrail_engines.plans import BuildError, BuildFault

# torch writes weights as they are, and compresses at most the sources of TorchScript.
COMPRESSED_BYTES_MAX = 64 << 20
TABLE_BYTES_MAX = 64 << 20
MEMBERS_MAX = 100_000

EXPORT_ADVICE = (
    "save the model with torch.export.save(torch.export.export(model.eval(), example_inputs, "
    "dynamic_shapes=...), 'model.pt2')"
)


class Kind(Enum):
    """The two kinds of file that can be read."""

    EXPORTED = auto()  # torch.export.save
    TORCHSCRIPT = auto()  # torch.jit.save


def kind_of(path: Path) -> Kind:
    """Look into the file, and read it all once for its checksums.

    Raises BuildError for everything else, and for a file that is damaged or holds pickled objects.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if not zipfile.is_zipfile(path):
            raise _refusal(path, _no_archive(start))
        with zipfile.ZipFile(path) as archive:
            _check_start(path, archive)
            _check_sizes(path, archive)
            members = _members(archive)
            kind = _kind(path, archive, members)
            if kind is Kind.EXPORTED:
                _check_program(path, archive, members)
            _check_sums(path, archive)
            return kind
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise _refusal(path, f"damaged or cut short: {error}") from None
    except FileNotFoundError:
        raise BuildError(BuildFault.MISSING, f"{path.name}: no such file") from None
    except OSError as error:
        fault = f"{path.name} cannot be read: {error.strerror or error}"
        raise BuildError(BuildFault.MISSING, fault) from None


def _refusal(path: Path, text: str) -> BuildError:
    return BuildError(BuildFault.REFUSED, f"{path.name}: {text}")


def _no_archive(start: bytes) -> str:
    """What a file that is no zip archive seems to be, by how it begins."""
    if not start:
        return "the file is empty"
    if start.startswith(b"PK\x03\x04"):
        return "cut short or damaged: its table of contents is missing"
    if start.startswith(b"\x80") and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "a Python pickle, as torch.save wrote it before PyTorch 1.6; loading one runs the "
            f"code in it, so it is not loaded: {EXPORT_ADVICE}"
        )
    if start[:1] == b"\x08" and start[1:2] < b"\x20" and start[2:3] in (b"\x12", b":", b"B"):
        return "looks like an ONNX file: name it model.onnx"
    if start[8:9] == b"{":
        return f"looks like safetensors, which holds weights and no model: {EXPORT_ADVICE}"
    return f"not a file of PyTorch's: no zip archive. To make one, {EXPORT_ADVICE}"


def _check_start(path: Path, archive: zipfile.ZipFile) -> None:
    """Programs hold an archive with their example inputs. Of a program that is cut short, it would
    be taken for the whole."""
    if min((member.header_offset for member in archive.infolist()), default=0):
        raise _refusal(path, "cut short or damaged: its table of contents is missing")


def _check_sizes(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if len(members) > MEMBERS_MAX:
        raise _refusal(path, f"{len(members)} members, more than the {MEMBERS_MAX} that are read")
    unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
    if unpacked > COMPRESSED_BYTES_MAX:
        raise _refusal(
            path,
            f"{unpacked} bytes of it are compressed, at most {COMPRESSED_BYTES_MAX} are unpacked: "
            "PyTorch stores weights uncompressed, so save it with PyTorch again",
        )


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    """Names without the archive's own folder -> names in the file."""
    return {name.partition("/")[2]: name for name in archive.namelist()}


def _kind(path: Path, archive: zipfile.ZipFile, members: dict[str, str]) -> Kind:
    if "archive_format" in members:
        found = archive.read(members["archive_format"])[:16].strip()
        if found != b"pt2":
            raise _refusal(path, f"an archive of the format {found!r}, expected b'pt2'")
        return Kind.EXPORTED
    if "constants.pkl" in members and any(name.startswith("code/") for name in members):
        return Kind.TORCHSCRIPT
    if "data.pkl" in members:
        raise _refusal(
            path,
            "written by torch.save: a pickled module or a state dict. The first needs the Python "
            "code of its class and runs what the pickle says, the second holds weights and no "
            f"model, so neither is loaded: {EXPORT_ADVICE}",
        )
    if "serialized_exported_program.json" in archive.namelist():
        raise _refusal(
            path, "written by torch.export.save of PyTorch 2.7 or older: save it again with 2.8"
        )
    raise _refusal(path, f"a zip archive, but none of PyTorch's. To make one, {EXPORT_ADVICE}")


def _check_program(path: Path, archive: zipfile.ZipFile, members: dict[str, str]) -> None:
    programs = [name for name in members if name.startswith("models/") and name.endswith(".json")]
    if any(name.startswith("data/aotinductor/") for name in members):
        raise _refusal(
            path,
            "holds libraries compiled by AOTInductor, which are native code and not loaded: "
            f"{EXPORT_ADVICE}",
        )
    if programs != ["models/model.json"]:
        found = ", ".join(programs) or "none (was torch.export.save interrupted?)"
        raise _refusal(path, f"expected one program, models/model.json, found {found}")
    for place in ("weights", "constants"):
        if f"data/{place}/model.pt" in members:
            raise _refusal(path, f"its {place} are pickled, as old versions did: save it again")
        table = f"data/{place}/model_{place}_config.json"
        if table not in members:
            raise _refusal(path, f"damaged: {table} is missing")
        files = {n.rpartition("/")[2] for n in members if n.startswith(f"data/{place}/")}
        _check_table(path, table, _read_table(path, archive, members[table]), files)


def _read_table(path: Path, archive: zipfile.ZipFile, member: str) -> Iterable[tuple[str, Any]]:
    if archive.getinfo(member).file_size > TABLE_BYTES_MAX:
        raise _refusal(path, f"{member} is larger than {TABLE_BYTES_MAX} bytes")
    try:
        return list(json.loads(archive.read(member))["config"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refusal(path, f"damaged: {member} is not what PyTorch writes") from None


def _check_table(
    path: Path, table: str, rows: Iterable[tuple[str, Any]], files: Collection[str]
) -> None:
    """Only plain tensors, lying in the archive as bytes. files: those beside the table."""
    for name, row in rows:
        is_plain = isinstance(row, dict) and row.get("use_pickle") is False
        place = str(row.get("path_name", "")) if isinstance(row, dict) else ""
        if not is_plain or not place.startswith(("weight_", "tensor_")):
            raise _refusal(
                path,
                f"'{name}' in {table} is a pickled object; loading one runs the code in it. Only "
                "plain tensors are taken: no tensor subclasses, no script objects",
            )
        if place not in files:
            raise _refusal(path, f"damaged: {place}, which holds '{name}', is missing")


def _check_sums(path: Path, archive: zipfile.ZipFile) -> None:
    damaged = archive.testzip()
    if damaged is not None:
        raise _refusal(path, f"damaged: {damaged} does not have the checksum that was saved for it")
