# SPDX-License-Identifier: Apache-2.0
"""The one error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

from thirdrail.errors import InvalidArgument

TEXT_CHARS_MAX = 4000


class RepositoryError(InvalidArgument):
    """The repository, a model folder or a configuration is at fault; unchanged, it stays so.

    The text is fit for callers, terminals and logs: it names the model and the file, what was
    expected and what was found, in one line of bounded length without control characters.
    """

    def __init__(self, text: str) -> None:
        # Texts quote names and files that anybody may have written.
        shown = text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}..."
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown))


@contextmanager
def blaming(model: str) -> Iterator[None]:
    """Adds the model's name to what is wrong inside."""
    try:
        yield
    except InvalidArgument as error:
        raise RepositoryError(f"model '{model}': {error}") from None
