# SPDX-License-Identifier: Apache-2.0
"""Magika's input for a file of your own, as raw numbers on standard output, for `thirdrail infer`.

python -m thirdrail_server.demo.tokens .demo/models FILE | thirdrail infer magika --input bytes=@-
"""

import sys
from pathlib import Path

from thirdrail_server.demo.content_types import MagikaConfig, tokens


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python -m thirdrail_server.demo.tokens REPOSITORY FILE")
    repository, file = map(Path, sys.argv[1:])
    try:
        config = MagikaConfig.from_json((repository / "magika" / "config.min.json").read_text())
        row = tokens(file.read_bytes(), config)
    except OSError as error:
        sys.exit(f"cannot read {error.filename}: {error.strerror}")
    sys.stdout.buffer.write(row.tobytes())


if __name__ == "__main__":
    main()
