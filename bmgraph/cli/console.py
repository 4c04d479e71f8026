"""The console that all commands print to: nothing that it prints can steer a terminal or be read as markup."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

BROKEN_PIPE = 141
"""The exit code of a command whose reader has left, as of one that SIGPIPE (13) ends."""

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, line separators, overrides of direction, and lone surrogates."""


def clean(text: str, encoding: str = "utf-8") -> str:
    r"""A text with escapes (`\x1b`) for what would steer a terminal, and for what its encoding does not have.

    Example:
        >>> clean("\x1b[2Jwiped")
        '\\x1b[2Jwiped'
    """
    escaped = _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str, longest: int = 2000) -> str:
    """A text as a single line, with its middle left out where it is very long."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest // 2]} ... {line[-longest // 2 :]}"


class CleanConsole(Console):
    """A rich console that cleans every string (`clean`), and takes square brackets and colons as they are.

    Our own texts ask for markup: `print(..., markup=True)`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """As of rich; cleaned before it is measured."""
        return super().render_str(clean(text, self.encoding), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As of rich; all that is printed comes through here, also texts that others made."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=clean(segment.text, self.encoding))

    def on_broken_pipe(self) -> None:
        """End without a word when nobody reads any more."""
        discard_output()
        raise SystemExit(BROKEN_PIPE)


def discard_output() -> None:
    """Make what is still to be flushed at the end go nowhere, where it would only raise again."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.__stdout__):
        try:
            if stream is not None:
                os.dup2(devnull, stream.fileno())
        except (OSError, ValueError):
            continue  # closed, or no file
    os.close(devnull)
