# SPDX-License-Identifier: Apache-2.0
"""`python -m thirdrail_server.demo`: the same as `thirdrail demo`."""

import typer

from thirdrail_server.demo.cli import demo

if __name__ == "__main__":
    typer.run(demo)
