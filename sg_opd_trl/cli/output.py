"""Whatever a command prints or logs passes one function, which leaves the secrets out."""

import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from types import TracebackType
from typing import Any

from ..scrubbing import remember, shown


class ScrubbedStream:
    """A text stream without secrets; in everything else it is the stream that it stands for."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without its secrets; the number of letters that were given."""
        self._stream.write(shown(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def scrubbed_output(words: Sequence[str]) -> Iterator[None]:
    """Leave secrets out of what this process prints and logs.

    Args:
        words: of the command line, whose flags may hold secrets.
    """
    _remember_flags(words)
    # The interpreter shows what nobody has caught when the command has been left already.
    sys.excepthook = _show_traceback
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = ScrubbedStream(sys.stdout), ScrubbedStream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _remember_flags(words: Sequence[str]) -> None:
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        if equals or not following.startswith("--"):
            remember(value if equals else following, flag.lstrip("-"))


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(shown("".join(traceback.format_exception(kind, error, trace))))
