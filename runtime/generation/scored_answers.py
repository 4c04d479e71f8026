"""Answers of a decode loop with the score of each id."""

from __future__ import annotations

from collections.abc import Sequence

from bmgraph.runtime.generation.batching.request import LENGTH, STOP, Answer
from bmgraph.runtime.generation.decode_loop import DecodeLoop
from bmgraph.runtime.generation.detokenizer import TextStream
from bmgraph.runtime.generation.logprobs import IdScore
from bmgraph.runtime.generation.tokenizer import Tokenizer


def scored_answers(
    loop: DecodeLoop, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer | None, stops: tuple[str, ...]
) -> list[Answer]:
    """Run a loop whose ids are scored; the answer of each row, to the prompt of the same number."""
    rows = [_Row(None if tokenizer is None else TextStream(tokenizer, stops)) for _ in prompts]
    for picked in loop:
        for number, row in enumerate(rows):
            if not row.reason:
                score = loop.scored(number)
                assert score is not None
                row.take(int(picked[number]), score, ended=bool(loop.done[number]))
                loop.done[number] = bool(row.reason)
    return [row.answer(len(prompt)) for row, prompt in zip(rows, prompts)]


class _Row:
    """One answer as it grows; `reason` is why it ended, "" while it has not."""

    def __init__(self, stream: TextStream | None) -> None:
        self.reason, self._stream = "", stream
        self._ids: list[int] = []
        self._scores: list[IdScore] = []
        self._text = ""

    def take(self, item: int, score: IdScore, ended: bool) -> None:
        """Go on with an id, or end at one."""
        if ended:
            self.reason = STOP
            return
        self._ids.append(item)
        self._scores.append(score)
        if self._stream is not None:
            self._text += self._stream.push(item)
            if self._stream.ended:
                self.reason = STOP

    def answer(self, prompt_tokens: int) -> Answer:
        """The whole answer."""
        rest = "" if self._stream is None else self._stream.finish()
        return Answer(
            self._text + rest, tuple(self._ids), self.reason or LENGTH, prompt_tokens, tuple(self._scores)
        )
