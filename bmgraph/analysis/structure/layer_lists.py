"""Cuts lists of layers short: of layers that compute alike the first ones stay, so that a part of a program stands for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from bmgraph.ir.editor import remove_dead
from bmgraph.ir.program import Program


@dataclass(frozen=True)
class ShortList:
    """A list of `count` layers at a module path, of which the first `kept` stay: every other computes as one of them does."""

    path: str
    kept: int
    count: int

    def __str__(self) -> str:
        left = f"{self.path}.{self.kept}"
        return left if self.kept + 1 == self.count else f"{left} to {self.path}.{self.count - 1}"


def cut_lists(program: Program, lists: Mapping[str, int]) -> tuple[Program, tuple[ShortList, ...]]:
    """A copy of a program without the layers that are equal to earlier ones; `lists`: the number of layers by the path of
    their list. What is not cut short is not among the results.

    Layers are equal if they make the same calls on what they, the layer before and the rest of the program compute, with
    parameters of the same shapes and types at the same places. The last layer that stays is equal to the last of all, and
    what follows reads it instead. A list stays whole where what is not in it reads more of it than its first and last layer.
    """
    found: list[ShortList] = []
    short = program.clone()
    for path, count in sorted(lists.items()):
        if any(path.startswith(f"{one.path}.") for one in found):
            continue
        layers = _Layers(short, path, count)
        kept = layers.needed()
        if 0 < kept < count:
            layers.keep(kept)
            found.append(ShortList(path, kept, count))
    remove_dead(short)
    return short, tuple(found)


class _Layers:
    """The calls of each layer of a list, in the order of the graph of a program's entry."""

    def __init__(self, program: Program, path: str, count: int) -> None:
        self._program, self._path = program, path
        self._calls: list[list[fx.Node]] = [[] for _ in range(count)]
        self._place: dict[fx.Node, tuple[int, int]] = {}
        for node in program.graph.nodes:
            layer = self._layer(str(node.meta.get("scope", "")))
            if node.op == "call_function" and layer is not None and layer < count:
                self._place[node] = layer, len(self._calls[layer])
                self._calls[layer].append(node)

    def needed(self) -> int:
        """How many layers stand for all; 0 if that cannot be said."""
        kinds = [self._kind(index) for index in range(len(self._calls))]
        read = {self._place[node][0] for node in self._place if self._is_read_outside(node)}
        written = any(self._layer(name) is not None for name in self._program.writes)
        if not all(self._calls) or written or not read <= {0, len(kinds) - 1}:
            return 0
        least = max((kinds.index(kind) + 1 for kind in kinds), default=0)
        return next((kept for kept in range(least, len(kinds)) if kinds[kept - 1] == kinds[-1]), 0)

    def keep(self, kept: int) -> None:
        """Remove the layers from the number `kept` on."""
        for old, new in zip(self._calls[-1], self._calls[kept - 1], strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self._place)
        for node in reversed(self._program.graph.nodes):
            if self._place.get(node, (0, 0))[0] >= kept:
                self._program.graph.erase_node(node)

    def _layer(self, path: str) -> int | None:
        """The number of the layer that a path lies in."""
        number = path.removeprefix(f"{self._path}.").split(".")[0]
        return int(number) if path.startswith(f"{self._path}.") and number.isdecimal() else None

    def _is_read_outside(self, node: fx.Node) -> bool:
        return any(user not in self._place for user in node.users)

    def _kind(self, index: int) -> tuple[Any, ...]:
        def seen(source: fx.Node) -> str:
            return str(self._seen(source, index))

        return tuple(
            (node.target, str(fx.map_arg(node.args, seen)), str(fx.map_arg(node.kwargs, seen)))  # type: ignore[arg-type]
            for node in self._calls[index]
        )

    def _seen(self, source: fx.Node, index: int) -> tuple[Any, ...]:
        """A value as a layer sees it: what it is there, whichever layer that is."""
        if source in self._place:
            layer, position = self._place[source]
            return ("own" if layer == index else "last" if layer == index - 1 else layer), position
        name = str(source.target)
        if source.op == "get_attr" and self._layer(name) == index:
            tensor = self._program.tensor(name)
            frozen = name in self._program.frozen
            return name.removeprefix(f"{self._path}.{index}."), tuple(tensor.shape), tensor.dtype, frozen
        return "rest", source.name
