"""Says which known name a wrong one may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean 'x'?` where a known name is at least `cutoff` similar, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""
