"""What may be kept for backward, from most to fewest bytes."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from bmgraph.passes.remat.forward_part import ForwardPart, Segment
from bmgraph.passes.remat.minimum_cut import kept_values
from bmgraph.passes.remat.recompute import is_cheap, is_pure


class Choices:
    """What may be kept, from level 0, "auto", over more and more whole layers, then groups of more and more layers."""

    def __init__(self, part: ForwardPart) -> None:
        self.part = part
        self._made: dict[int, set[fx.Node]] = {}
        self.layers = len(part.layers)
        """The level at which each layer is computed again; those above it group layers."""
        self.groups = tuple(_groups(self.layers))
        """The sizes of groups, in the order of their levels."""

    def name(self, level: int) -> str:
        """A level in words."""
        if level == 0:
            return "forward"
        if level <= self.layers:
            return f"{level} of {self.layers} layers"
        return f"groups of {self.groups[level - self.layers - 1]} layers"

    def kept(self, level: int) -> set[fx.Node]:
        """The values that are kept at a level."""
        layers = self.part.layers
        if level == 0:
            return self._cut(0)
        if level > len(layers):
            return self._cut(self.groups[level - len(layers) - 1])
        end = layers[level - 1].end
        auto, whole = self._cut(0), self._cut(1)
        place = self.part.place
        return {node for node in whole if place[node] < end} | {node for node in auto if place[node] >= end}

    def _cut(self, size: int) -> set[fx.Node]:
        """What is kept if groups of `size` layers are computed again; 0: what is cheap alone."""
        if size not in self._made:
            part = self.part
            segments = _grouped(part.layers, max(size, 1))
            of = {place: segment for segment in segments for place in range(segment.begin, segment.end)}

            def can(node: fx.Node) -> bool:
                segment = of.get(part.place[node])
                if segment is not None and part.last_reader(node) >= segment.end:
                    return False  # it goes into a later layer
                return is_pure(node) if size and segment is not None else is_cheap(node)

            self._made[size] = kept_values(part, can)
        return self._made[size]


def _groups(count: int) -> Iterator[int]:
    """Sizes of groups of layers: 2, 4, ... up to all."""
    size = 2
    while size < 2 * count and count > 1:
        yield min(size, count)
        size *= 2


def _grouped(layers: list[Segment], size: int) -> list[Segment]:
    groups = [layers[index : index + size] for index in range(0, len(layers), size)]
    return [Segment(group[0].name, group[0].begin, group[-1].end) for group in groups]
