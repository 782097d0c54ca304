# SPDX-License-Identifier: Apache-2.0
"""The work of a build's process: an order on standard input, answers on standard output.

All else that anything in here prints goes to standard error.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable

from thirdrail_engines.builds import stages, wire


def work(warnings: Iterable[str]) -> None:
    """warnings: to be handed on with the result."""
    answers = _take_over_stdout()
    order = wire.read_order(sys.stdin.buffer.readline())
    progress = stages.Throttle(lambda answer: _say(answers, wire.write_answer(answer)))
    answer: wire.Answer
    try:
        result = stages.carry_out(order, progress.tell)
        answer = dataclasses.replace(result, warnings=(*warnings, *result.warnings))
    except Exception as error:  # of whatever libraries met in a stranger's model
        answer = stages.refusal_of(error, order.folder)
    _say(answers, wire.write_answer(answer))


def _take_over_stdout() -> int:
    """The pipe to the parent under another number; what is printed goes to standard error."""
    answers = os.dup(1)
    os.dup2(2, 1)
    return answers


def _say(answers: int, line: bytes) -> None:
    while line:  # ends: a pipe takes some of it, or is broken
        line = line[os.write(answers, line) :]
