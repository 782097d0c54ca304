# SPDX-License-Identifier: Apache-2.0
"""The command line. It needs packages of the extra `cli`, so this file imports none of them."""

import sys

EXIT_REFUSED = 1  # the server said no
EXIT_USAGE = 2  # the command line is wrong, or a package for it is missing
EXIT_UNREACHABLE = 3  # no server answered
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C


def main() -> None:
    """The console script `thirdrail`."""
    try:
        _main()
    except KeyboardInterrupt:  # while packages were imported; later, typer takes care of it
        sys.exit(EXIT_INTERRUPTED)


def _main() -> None:
    try:
        from thirdrail.cli.app import app
    except ModuleNotFoundError as error:
        if not install_hint(error, "cli"):
            raise
        print(install_hint(error, "cli"), file=sys.stderr)
        sys.exit(EXIT_USAGE)
    app(prog_name="thirdrail")


def install_hint(error: ModuleNotFoundError, extra: str) -> str | None:
    """The line that makes a command work whose packages are missing; None if the module is ours."""
    missing = (error.name or "").partition(".")[0]
    if not missing or missing.startswith("thirdrail"):
        return None
    return f"The package {missing} is missing. Install it with: pip install 'thirdrail[{extra}]'"
