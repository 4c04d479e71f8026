"""Incremental detokenization: turn a stream of ids into pieces of text, and cut it at stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from bmgraph.runtime.generation.tokenizer import Tokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer decodes the bytes of an incomplete character to."""


class TextStream:
    """The text of one row, piece by piece.

    A piece is returned once no later id can change it. `ended` is set when one of the `stops` occurs; that stop string
    and all text after it are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # text of ids before `_decoded` was returned or is in `_pending`; decoding starts at `_begin`, for context
        self._begin = self._decoded = 0
        self._pending = ""
        self.ended = False

    def push(self, item: int) -> str:
        """Append an id; returns the text that is now final, which may be empty."""
        if self.ended:
            return ""
        self._ids.append(item)
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded])
        now = self._tokenizer.decode(self._ids[self._begin :])
        if now.endswith(_INCOMPLETE) or len(now) <= len(before):
            return ""
        # start decoding at the last piece, not at the new ids: tokenizers place spaces depending on the text before
        self._begin, self._decoded = self._decoded, len(self._ids)
        return self._release(now[len(before) :], last=False)

    def finish(self) -> str:
        """The remaining text, once no more ids follow."""
        if self.ended:
            return ""
        before = self._tokenizer.decode(self._ids[self._begin : self._decoded])
        now = self._tokenizer.decode(self._ids[self._begin :])
        piece = self._release(now[len(before) :], last=True)
        self.ended = True
        return piece

    def _release(self, text: str, last: bool) -> str:
        """The text up to a stop string; a suffix that may be the beginning of a stop string is kept for later."""
        text = self._pending + text
        found = [index for stop in self._stops if (index := text.find(stop)) >= 0]
        if found:
            self.ended, self._pending = True, ""
            return text[: min(found)]
        kept = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._pending = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of a text that is a proper prefix of a stop string."""
    return next(
        (size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0
    )
