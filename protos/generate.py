# SPDX-License-Identifier: Apache-2.0
"""Generate the Python stubs from protos/; with --check, say whether the committed ones are stale.

The generator is pinned to the oldest release whose runtime floor we promise to clients: stubs made
by grpcio-tools 1.71 load on protobuf 5.29 and every later release seen so far, stubs made by a new
generator refuse old runtimes. It runs in an environment of its own (.venv-proto), because it needs
an old protobuf.
"""

import filecmp
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
PROTOS = REPO / "protos"
VENV = REPO / ".venv-proto"
GENERATOR = ["grpcio-tools==1.71.2", "mypy-protobuf==3.6.0", "setuptools==80.9.0"]

# (folder to write into, protoc's import paths, files). The second maps the KServe contract to a
# path inside our package, so that its stubs never claim the top-level name `inference`.
OUTPUTS = [
    ("client", [f"-I{PROTOS}"], sorted((PROTOS / "thirdrail/v1").glob("*.proto"))),
    (
        "server",
        [f"-Ithirdrail_server/inference={PROTOS / 'inference'}"],
        sorted((PROTOS / "inference").glob("*.proto")),
    ),
]
QUIET = {"mypy": "quiet:", "mypy_grpc": "quiet:"}
# Their __init__.py. The server's stubs are never loaded before the client's.
STUB_FOLDERS = {
    "client/thirdrail/v1": """\
# SPDX-License-Identifier: Apache-2.0
from thirdrail.protobuf_floor import require_floor

require_floor()
""",
    "server/thirdrail_server/inference": "",
}


def main() -> int:
    python = generator_python()
    if "--check" not in sys.argv[1:]:
        generate(python, REPO)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(python, Path(folder))
        stale = [path for stubs in STUB_FOLDERS for path in differences(Path(folder), stubs)]
    for path in stale:
        print(f"stale stub: {path} (run: make proto)", file=sys.stderr)
    return 1 if stale else 0


def generator_python() -> Path:
    python = VENV / "bin/python"
    stamp = VENV / "installed"
    if not stamp.is_file() or stamp.read_text() != "\n".join(GENERATOR):
        venv.create(VENV, with_pip=True, clear=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *GENERATOR],
            check=True,
        )
        stamp.write_text("\n".join(GENERATOR))
    return python


def generate(python: Path, root: Path) -> None:
    for folder, includes, files in OUTPUTS:
        out = root / folder
        out.mkdir(exist_ok=True)
        with_services = [file for file in files if "\nservice " in file.read_text()]
        protoc(python, includes, files, out, ["python", "mypy"])
        protoc(python, includes, with_services, out, ["grpc_python", "mypy_grpc"])
    for stubs, init in STUB_FOLDERS.items():
        (root / stubs / "__init__.py").write_text(init)


def protoc(
    python: Path, includes: list[str], files: list[Path], out: Path, kinds: list[str]
) -> None:
    plugins = [f"--plugin=protoc-gen-{n}={VENV}/bin/protoc-gen-{n}" for n in ("mypy", "mypy_grpc")]
    outputs = [f"--{kind}_out={QUIET.get(kind, '')}{out}" for kind in kinds]
    arguments = [*includes, *plugins, *outputs, *map(str, files)]
    subprocess.run([str(python), "-m", "grpc_tools.protoc", *arguments], check=True)


def differences(fresh: Path, stubs: str) -> list[str]:
    names = {p.name for root in (fresh, REPO) for p in (root / stubs).glob("*.py*")}
    return [
        f"{stubs}/{name}"
        for name in sorted(names)
        if not _same(fresh / stubs / name, REPO / stubs / name)
    ]


def _same(left: Path, right: Path) -> bool:
    return left.exists() and right.exists() and filecmp.cmp(left, right, shallow=False)


if __name__ == "__main__":
    raise SystemExit(main())
