"""What requests leave to later ones whose prompts begin with the same: cached positions, and the logits after the prompt that was read last."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from bmgraph.runtime.generation.batching.held_positions import HeldPositions
from bmgraph.runtime.generation.batching.joining import JoiningState
from bmgraph.runtime.generation.batching.prefix_tree import PrefixTree
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.sampling import Array


class Prefixes:
    """Keeps `most` positions at most. For use by one thread."""

    def __init__(self, most: int) -> None:
        self._tree = PrefixTree(most)
        self._last: tuple[Hashable, list[int], Array] | None = None

    @property
    def held(self) -> int:
        """How many positions are kept."""
        return self._tree.held

    def find(self, request: Request) -> tuple[list[HeldPositions], Array | None]:
        """What is kept of the beginning of a request's ids; of a prompt that was read last in whole all of it, with the logits f[V]
        after it, else less than all of it, so that a step gives the logits."""
        parts = self._tree.find(request.kind, request.read_ids)
        if sum(map(len, parts)) < len(request.read_ids):
            return parts, None
        if self._last is not None and self._last[:2] == (request.kind, request.read_ids):
            return parts, self._last[2]
        parts[-1] = parts[-1].part(0, len(parts[-1]) - 1)
        return [part for part in parts if len(part)], None

    def keep_prompt(self, request: Request, ids: list[int], state: JoiningState, logits: Array) -> None:
        """Keep the ids of a prompt that were read in whole into a state of its own, and the logits f[V] after them."""
        if not self._tree.most:
            return
        self._last = request.kind, ids, logits.copy()
        self._keep(request, state, 0, 0, len(ids))

    def keep_row(self, request: Request, state: JoiningState, row: int, front: int, length: int) -> None:
        """Keep the `length` positions of a row that leaves a batch, behind `front` of padding."""
        self._keep(request, state, row, front, length)

    def clear(self) -> None:
        """Keep nothing."""
        self._tree.clear()
        self._last = None

    def _keep(self, request: Request, state: JoiningState, row: int, front: int, length: int) -> None:
        ids: Sequence[int] = request.read_ids[:length]
        try:
            self._tree.keep(
                request.kind, ids, lambda begin, end: state.positions(row, front + begin, front + end)
            )
        except (MemoryError, RuntimeError):  # torch says so of memory too: requests that run need it more
            self.clear()
