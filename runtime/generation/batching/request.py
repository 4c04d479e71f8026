"""One request to an engine that batches continuously: what it asks, and the handle by which its answer is read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bmgraph.runtime.delta_slots import Hold
from bmgraph.runtime.generation.detokenizer import TextStream
from bmgraph.runtime.generation.logprobs import IdScore
from bmgraph.runtime.generation.sampling import Array, Sampler
from bmgraph.runtime.generation.sliding_window import SlidingWindow

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
"""Why an answer ended: at an id or a string that ends it, at the number of tokens asked for, by the caller, by an error."""


@dataclass(frozen=True)
class Piece:
    """What a step adds to an answer: an id (None where only held text comes out), the text that is now final, and the id's score if
    it was asked for."""

    id: int | None
    text: str
    score: IdScore | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer: `text` ("" without a tokenizer) without what ended it, all `ids` that were chosen but an id that ends, why it
    ended, and how many ids the prompt has. `scores` are those of the ids, where they were asked for; `cached_tokens`: so many ids of the
    prompt were not read again, since another text began with them."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    scores: tuple[IdScore, ...] | None = None
    cached_tokens: int = 0

    @property
    def new_tokens(self) -> int:
        """The number of ids in the answer."""
        return len(self.ids)


class Request:
    """A request that waits, runs or has ended. Iterate for its pieces as they come, texts or ids; `result()` waits for all of it.

    Each piece is given once: two that iterate share them. Thread-safe. Obtain one from `engine.submit(...)`.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        most_new: int,
        sampler: Sampler,
        ends: Sequence[int],
        row_inputs: Mapping[str, Array],
        stream: TextStream | None,
        hold: Hold | None = None,
        owner: object = None,
        window: SlidingWindow | None = None,
        encoded: tuple[int, int] | None = None,
    ) -> None:
        """`hold` is released when the request ends; `owner` lives as long as the request does; `window`: what its row reads of a longer
        text. `encoded`: the prompt is for an encoder, whose decoder starts with the first of these ids; the second stands in the place
        of padding."""
        self.prompt = list(prompt)
        self.row_inputs = dict(row_inputs)
        self.start, self.pad = encoded or (0, 0)
        self.most = (len(self.prompt) if encoded is None else 1) + most_new
        """The positions that its row takes at most."""
        self.submitted = time.perf_counter()
        self.first: float | None = None
        """When the first id was chosen, on the clock of `submitted`."""
        self.ended: float | None = None
        self.last_id = 0
        self._window = window
        if window is not None:
            self.most = window.positions(len(self.prompt), most_new)
        self.read_ids = list(self.prompt) if window is None else window.kept(self.prompt)
        """The ids of its row: those of its prompt and those that were chosen, within its window; a step reads each but the last."""
        self.cached = 0
        """How many tokens of its prompt another text had in front, and were not read again."""
        self.kind = (
            tuple((name, value.tobytes()) for name, value in sorted(self.row_inputs.items())),
            tuple(hold.versions) if hold is not None else (),
        )
        """What its cache depends on besides its ids."""
        self._most_new, self._sampler, self._ends, self._stream = most_new, sampler, frozenset(ends), stream
        self._hold, self._owner = hold, owner
        self._changed = threading.Condition()
        self._new: deque[Piece] = deque()
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._scores: list[IdScore] = []
        self._reason = ""
        self._error: BaseException | None = None
        self._cancelled = False
        self._listener: Callable[[], None] | None = None
        self._on_cancel: Callable[[], None] = lambda: None

    # ---- what callers use

    def __iter__(self) -> Iterator[Any]:
        """The pieces of text as they become final, or the ids of an engine without a tokenizer. Raises what ended the request, if an
        error did."""
        for piece in self.pieces():
            if self._stream is None:
                yield piece.id
            elif piece.text:
                yield piece.text

    def pieces(self) -> Iterator[Piece]:
        """As iteration, with ids, texts and scores of each step."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._reason)
                if not self._new:
                    break
                piece = self._new.popleft()
            yield piece
        if self._error is not None:
            raise self._error

    def result(self, timeout: float | None = None) -> Answer:
        """Wait for the end, `timeout` seconds at most; the answer, of a cancelled request as far as it came.

        Raises TimeoutError if it takes longer (the request goes on), and what ended the request, if an error did.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._reason, timeout):
                raise TimeoutError(f"the request did not end within {timeout} s")
        if self._error is not None:
            raise self._error
        return self.so_far

    def cancel(self) -> None:
        """End the request at the next step, or while it waits. Does nothing once it has ended."""
        with self._changed:
            self._cancelled = True
        self._on_cancel()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return bool(self._reason)

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop", "length", "cancelled", "error"; "" while it has not."""
        return self._reason

    @property
    def error(self) -> BaseException | None:
        """What ended it, if an error did."""
        return self._error

    @property
    def so_far(self) -> Answer:
        """The answer up to now, whether its pieces were read or not."""
        with self._changed:
            scores = tuple(self._scores) if self._sampler.logprobs is not None else None
            return Answer(
                "".join(self._texts), tuple(self._ids), self._reason, len(self.prompt), scores, self.cached
            )

    def take(self) -> list[Piece]:
        """The pieces that are there and were not given yet, without waiting."""
        with self._changed:
            found = list(self._new)
            self._new.clear()
        return found

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in the engine's thread, whenever there are new pieces or the request ends, and once now. It must be
        quick and raise nothing."""
        self._listener = listener
        listener()

    # ---- what the scheduler uses

    @property
    def cancelled(self) -> bool:
        """Whether the caller wants it to end."""
        return self._cancelled

    def on_cancel(self, tell: Callable[[], None]) -> None:
        """Have `tell` called when the caller cancels."""
        self._on_cancel = tell

    def accept(self, logits: Array) -> None:
        """Choose the next id from logits f[V]; the request may end with it. Raises what `Sampler.pick_one` raises."""
        picked = self._sampler.pick_one(0, logits)
        if self.first is None:
            self.first = time.perf_counter()
        if picked in self._ends:
            self.finish(STOP)
            return
        self.last_id = picked
        self.read_ids.append(picked)
        score = self._sampler.scored(0)
        text = self._stream.push(picked) if self._stream is not None else ""
        with self._changed:
            self._ids.append(picked)
            if score is not None:
                self._scores.append(score)
            self._put(Piece(picked, text, score))
        if self._stream is not None and self._stream.ended:
            self.finish(STOP)
        elif len(self._ids) == self._most_new:
            self.finish(LENGTH)
        elif self._listener is not None:
            self._listener()

    @property
    def outgrown(self) -> bool:
        """Whether its row is longer than its window: it goes on when what stays was read again."""
        return self._window is not None and len(self.read_ids) > self._window.size

    def slide(self) -> None:
        """Forget what does not stay within its window."""
        assert self._window is not None
        self.read_ids = self._window.kept(self.read_ids)

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End the request. Does nothing the second time."""
        rest = self._stream.finish() if self._stream is not None and not self._reason else ""
        with self._changed:
            if self._reason:
                return
            if rest:
                self._put(Piece(None, rest))
            self.ended = time.perf_counter()
            self._reason, self._error = reason, error
            self._changed.notify_all()
        if self._hold is not None:
            self._hold.release()
        if self._listener is not None:
            self._listener()

    def _put(self, piece: Piece) -> None:
        """Add a piece; called with `_changed`."""
        self._new.append(piece)
        self._texts.append(piece.text)
        self._changed.notify_all()
