"""Reading the prompt of one request, or what stays of its text, in chunks, into a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bmgraph.runtime.generation.batching.held_positions import HeldPositions
from bmgraph.runtime.generation.batching.joining import JoiningDecoder
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.sampling import Array


class Prefill:
    """A request whose ids are being read; `state` is its cache, `read` how many of its `ids` are in it,
    and `again` says that some were chosen before its window slid.

    `parts` are what the beginning of the prompt left in another cache; they need not be read again. `logits` f[V] are those after the
    prompt where they are all of it.
    """

    def __init__(
        self,
        decoder: JoiningDecoder,
        request: Request,
        parts: Sequence[HeldPositions] = (),
        logits: Array | None = None,
    ) -> None:
        self.request, self.state = request, decoder.start(1, {}, request.most)
        if parts:
            self.state.begin_with(parts)
        self.read, self.ids = sum(map(len, parts)), list(request.read_ids)
        self.again = request.first is not None
        if not self.again:
            request.cached = self.read
        self._cache, self._logits = decoder.cache, logits

    @property
    def left(self) -> int:
        """How many of the ids are still to be read."""
        return len(self.ids) - self.read

    def step(self, most: int) -> Array:
        """Read `most` more tokens at most, 1 or more unless none are left; the logits f[V] after the last of them."""
        if not self.left:
            assert self._logits is not None
            return self._logits
        begin, self.read = self.read, min(self.read + most, len(self.ids))
        tokens = np.array([self.ids[begin : self.read]], np.int64)
        mask = np.ones((1, self.read), np.int64)
        feeds = step_feeds(self._cache, tokens, mask, self.request.row_inputs, [tokens.shape[1] - 1])
        logits: Array = self.state.step(feeds)[0]
        return logits
