"""From ids that come one by one to pieces of text."""

from __future__ import annotations

from collections.abc import Sequence

from bmgraph.runtime.generation.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character decode to before the last of them has come."""


class TextStream:
    """The text of one row, piece by piece. A piece is given once no later id can change it; `ended` once one of the
    `stops` has come: it and all behind it are left out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        self._begin = self._known = 0  # ids before `_begin` are done with; those before `_known` were decoded
        self._held = ""
        self.ended = False

    def push(self, item: int) -> str:
        """The text that an id makes certain; may be empty."""
        if self.ended:
            return ""
        self._ids.append(item)
        before = self._tokenizer.decode(self._ids[self._begin : self._known])
        now = self._tokenizer.decode(self._ids[self._begin :])
        if now.endswith(UNFINISHED) or len(now) <= len(before):
            return ""
        # decoding begins at the last piece, not at the first: tokenizers put spaces by what stands before
        self._begin, self._known = self._known, len(self._ids)
        return self._release(now[len(before) :], last=False)

    def finish(self) -> str:
        """What is left when no more ids come."""
        if self.ended:
            return ""
        before = self._tokenizer.decode(self._ids[self._begin : self._known])
        now = self._tokenizer.decode(self._ids[self._begin :])
        piece = self._release(now[len(before) :], last=True)
        self.ended = True
        return piece

    def _release(self, text: str, last: bool) -> str:
        """Text up to a stop; where one may have begun, what it would be is held back."""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.ended, self._held = True, ""
            return text[: min(places)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop begins with."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
