"""The rows that decode together: each step gives each of them one id; rows join behind the others, and leave between steps.

T positions of the cache: those of the longest row; shorter rows have padding in front, or behind where the decoder's rows end apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bmgraph.runtime.generation.batching.encoded_prompt import decoder_inputs, encoded_positions
from bmgraph.runtime.generation.batching.joining import JoiningDecoder, JoiningState, row_mask
from bmgraph.runtime.generation.batching.prefixes import Prefixes
from bmgraph.runtime.generation.batching.request import ERROR, Request
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.sampling import Array

SLACK = 64
"""Positions that are padding in all rows are dropped when there are so many, and they are half of all."""

STEP = 256
"""Positions that the memory of rows is reserved for are a multiple of it, if there are so many."""


class Batch:
    """Requests that run, a row each, over one state of a decoder.

    The memory of the state is reserved for at most `most_rows` rows and `positions` positions of rows in all; what an encoder gave for a
    row counts as positions that take as much. What rows hold is left to `prefixes` when they leave.
    """

    def __init__(self, decoder: JoiningDecoder, most_rows: int, positions: int, prefixes: Prefixes) -> None:
        self.requests: list[Request] = []
        self.outgrown: list[Request] = []
        """Those that left since what stays of their texts is to be read again."""
        self._decoder, self._most_rows, self._positions = decoder, most_rows, positions
        self._prefixes, self._apart = prefixes, decoder.rows_end_apart
        self._state: JoiningState | None = None
        self._lengths = np.zeros(0, np.int64)
        self._inputs: Mapping[str, Array] = {}
        self._held = 0
        self._reserved = (0, 0)

    @property
    def held_positions(self) -> int:
        """The positions of the cache that hold tokens of requests that run."""
        pairs = zip(self.requests, self._lengths.tolist())
        return sum(length for request, length in pairs if not request.done)

    def has_room(self, request: Request) -> bool:
        """Whether a request may join now, with the cache of its own that it has until then."""
        rows = len(self.requests) + 1
        return rows <= self._most_rows and (rows + 1) * self._room_of_row(request) <= self._positions

    def could_hold(self, request: Request) -> bool:
        """Whether a request may join when no other runs."""
        return self.needed(request) <= self._positions

    def needed(self, request: Request) -> int:
        """The positions that a request takes at most when no other runs, with the cache of its own that it begins with."""
        return 2 * (request.most + self._beside(request))

    def join(self, request: Request, state: JoiningState, length: int) -> None:
        """Let a request whose prompt of `length` tokens was read into a state of its own go on with the others."""
        if self._state is None:
            self._state, self._held = state, length
            self._reserve(1, request)
        else:
            self._reserve(len(self.requests) + 1, request)
            self._state.join(state)
            self._held = max(self._held, length)
        self.requests.append(request)
        self._lengths = np.append(self._lengths, length)
        self._inputs = self._row_inputs()

    def step(self) -> None:
        """One step of all rows: each request gets its next id; those that end leave, and those that outgrow their window. Raises what
        the engine raises."""
        assert self._state is not None
        self._forget_padding()
        total = self._held + 1
        lengths, ends = self._lengths + 1, self._lengths if self._apart else None
        mask = row_mask(lengths, total, self._apart)
        tokens = np.array([[request.last_id] for request in self.requests], np.int64)
        logits = self._state.step(step_feeds(self._decoder.cache, tokens, mask, self._inputs, [0], ends))
        self._held, self._lengths = total, lengths
        for row, request in enumerate(self.requests):
            try:
                request.accept(logits[row])
            except (
                Exception
            ) as error:  # of this row alone: no id is left to choose, or its logits are not finite
                request.finish(ERROR, error)
        self.drop_ended()

    def drop_ended(self) -> None:
        """Let the requests that have ended leave, and those that outgrew their window."""
        left = [request.done or request.outgrown for request in self.requests]
        going = [row for row, gone in enumerate(left) if not gone]
        if len(going) == len(self.requests):
            return
        if not self._decoder.copies_all_rows:
            self._leave_prefixes()
        self.outgrown += [request for request in self.requests if request.outgrown and not request.done]
        if not going:
            self.clear()
            return
        # the last rows move to the places of those that left, so that few move
        late = [row for row in going if row >= len(going)]
        rows = [late.pop() if left[row] else row for row in range(len(going))]
        assert self._state is not None
        self._state.keep_rows(rows)
        self.requests = [self.requests[row] for row in rows]
        self._lengths = self._lengths[rows]
        self._inputs = self._row_inputs()
        longest = int(self._lengths.max())
        if self._apart and longest < self._held:
            self._state.forget(self._held - longest)
            self._held = longest

    def clear(self) -> None:
        """Forget all rows, and give their memory back."""
        self.requests, self._state, self._inputs = [], None, {}
        self._lengths, self._held, self._reserved = np.zeros(0, np.int64), 0, (0, 0)

    def _leave_prefixes(self) -> None:
        assert self._state is not None
        for row, (request, length) in enumerate(zip(self.requests, self._lengths.tolist())):
            if request.done and request.error is None:
                front = 0 if self._apart else self._held - length
                self._prefixes.keep_row(request, self._state, row, front, length)

    def _longest(self, request: Request) -> int:
        return max(request.most, *(other.most for other in self.requests), 0)

    def _beside(self, request: Request) -> int:
        """How many positions of the cache take the memory of what an encoder gives for a request."""
        cache = self._decoder.cache
        if not cache.memories:
            return 0
        encoded = cache.bytes_of_memories(encoded_positions(self._decoder, request.prompt))
        return -(-encoded // cache.bytes_of_position)

    def _room_of_row(self, request: Request) -> int:
        """The positions that each row takes at most once a request has joined."""
        return self._longest(request) + max(map(self._beside, [request, *self.requests]))

    def _reserve(self, rows: int, request: Request) -> None:
        """Have the state's memory reach for so many rows, and a request that joins."""
        most = self._longest(request)
        if rows <= self._reserved[0] and most <= self._reserved[1]:
            return
        assert self._state is not None
        if self._held > most:
            self._forget(self._held - int(self._lengths.max(initial=0)))
        row = self._room_of_row(request)
        rows = max(rows, min(self._most_rows, self._positions // row - 1))
        # somewhat more, where it may be had: each longer request would have all rows copied
        more = min(-most % STEP, self._positions // (rows + 1) - row)
        self._reserved = rows, most + max(0, more)
        self._state.reserve(*self._reserved)

    def _forget_padding(self) -> None:
        """Drop positions that are padding in all rows, where they are many, or in the way of new ones."""
        front = self._held - int(self._lengths.max())
        if front and (self._held >= self._reserved[1] or front >= max(SLACK, self._held // 2)):
            self._forget(front)

    def _forget(self, count: int) -> None:
        assert self._state is not None
        self._state.forget_front(count)
        self._held -= count

    def _row_inputs(self) -> dict[str, Array]:
        given = [decoder_inputs(self._decoder, request.row_inputs) for request in self.requests]
        return {name: np.concatenate([values[name] for values in given]) for name in given[0]}
