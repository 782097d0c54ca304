# SPDX-License-Identifier: Apache-2.0
"""The command line. It needs packages of the extra `cli`, so this file imports none of them."""

import os
import sys

EXIT_REFUSED = 1  # the server said no, or the output cannot be written
EXIT_USAGE = 2  # the command line is wrong, or a package for it is missing or too old
EXIT_UNREACHABLE = 3  # no server answered
EXIT_INTERRUPTED = 130  # as shells say it of Ctrl-C


def main() -> None:
    """The console script `thirdrail`."""
    try:
        _main()
    except KeyboardInterrupt:  # while packages were imported; later, typer takes care of it
        sys.exit(EXIT_INTERRUPTED)
    except OSError:
        why_not = _why_no_output()
        if why_not is None:
            raise
        print(f"Error: cannot write the output: {why_not}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    except Exception as error:
        from thirdrail.protobuf_floor import too_old

        fault = too_old(error)
        if fault is None:
            raise
        print(f"Error: {fault}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _why_no_output() -> str | None:
    """What keeps even an empty line from standard output; None: nothing. A closed pipe is no case
    of it: typer ends without a word then.
    """
    stdout = 1  # the descriptor
    try:
        os.write(stdout, b"\n")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)  # for what is left in buffers
        return error.strerror
    return None


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
