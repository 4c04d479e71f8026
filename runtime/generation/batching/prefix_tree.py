"""What was read before: positions of the KV cache by the ids that led to them, for prompts that begin with the same.

A radix tree: a node has the ids that follow those of the nodes above it, and what the cache held of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from bmgraph.runtime.generation.batching.held_positions import HeldPositions

MOST_NODES = 4096
"""How many pieces are kept at most, each of which takes time to look up and memory beside its positions."""

Copy = Callable[[int, int], HeldPositions]
"""Gives the positions from one to another of the row that is kept."""


class _Node:
    """A piece of texts; the root of each kind has none."""

    def __init__(self, ids: list[int], held: HeldPositions | None, above: _Node | None) -> None:
        self.ids, self.held, self.above = ids, held, above
        self.below: dict[int, _Node] = {}


class PrefixTree:
    """Keeps at most `most` positions; those that were not asked for longest go first. Texts of different kinds share nothing.

    For use by one thread.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._roots: dict[Hashable, _Node] = {}
        self._used: OrderedDict[_Node, Hashable] = OrderedDict()
        """All nodes with their kinds, the last used last; one stands behind all that are below it, so the first has none below."""

    def find(self, kind: Hashable, ids: Sequence[int]) -> list[HeldPositions]:
        """The positions of the longest beginning of `ids` that is kept, in pieces, which hold as long as the caller has them."""
        found: list[HeldPositions] = []
        path, last = self._path(kind, ids)
        for node in path:
            assert node.held is not None
            found.append(node.held)
        if path and last < len(path[-1].ids):
            found[-1] = found[-1].part(0, last)
        self._touch(path)
        return found

    def keep(self, kind: Hashable, ids: Sequence[int], copy: Copy) -> None:
        """Keep the positions of `ids`, as far as there is room; only those that are not there yet are copied."""
        path, last = self._path(kind, ids)
        known = sum(len(node.ids) for node in path[:-1]) + last
        new = min(len(ids), self.most) - known
        if new <= 0:
            self._touch(path)
            return
        if path and last < len(path[-1].ids):
            path[-1] = self._split(path[-1], last)
        self._touch(path)
        self._make_room(new)
        if path and path[-1] not in self._used:  # it has as many nodes as there may be
            return
        above = path[-1] if path else self._roots.setdefault(kind, _Node([], None, None))
        node = _Node(list(ids[known : known + new]), copy(known, known + new), above)
        above.below[node.ids[0]] = node
        self._used[node] = kind
        self.held += new
        self._touch(path)

    def clear(self) -> None:
        """Keep nothing."""
        self._roots.clear()
        self._used.clear()
        self.held = 0

    def _path(self, kind: Hashable, ids: Sequence[int]) -> tuple[list[_Node], int]:
        """The nodes that `ids` lead through, and how many ids of the last of them they have, 1 or more."""
        found: list[_Node] = []
        node, place, last = self._roots.get(kind), 0, 0
        while node is not None and last == len(node.ids) and place < len(ids):
            node = node.below.get(ids[place])
            if node is None:
                break
            rest = ids[place : place + len(node.ids)]
            last = next(
                (number for number, (one, other) in enumerate(zip(rest, node.ids)) if one != other), len(rest)
            )
            place += last
            found.append(node)
        return found, last

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._used.move_to_end(node)

    def _split(self, node: _Node, count: int) -> _Node:
        """Let the first ids of a node be one of their own, above the rest; returns it."""
        assert node.held is not None
        assert node.above is not None
        upper = _Node(node.ids[:count], node.held.part(0, count).copied(), node.above)
        node.above.below[upper.ids[0]] = upper
        node.held, node.ids = node.held.part(count, len(node.ids)).copied(), node.ids[count:]
        node.above = upper
        upper.below[node.ids[0]] = node
        self._used[upper] = self._used[node]
        return upper

    def _make_room(self, count: int) -> None:
        """Forget until there is room for so many positions in one more node."""
        while self._used and (self.held + count > self.most or len(self._used) >= MOST_NODES):
            node, kind = self._used.popitem(last=False)
            assert node.above is not None
            del node.above.below[node.ids[0]]
            self.held -= len(node.ids)
            if node.above.above is None and not node.above.below:
                self._roots.pop(kind, None)
