"""The forward part of a step's graph: where it ends, its layers, and what crosses from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import fx

from bmgraph.ir.program import output_node
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.training.recompute_weights import parameter_expressions
from bmgraph.training.step_program import StepProgram


@dataclass(frozen=True)
class Segment:
    """The calls of one or several layers in forward, by their places in the graph: from `begin` to before `end`."""

    name: str
    begin: int
    end: int


class ForwardPart:
    """The calls of a step before backward. `sizes`: bytes of the storages of each node's value."""

    def __init__(self, step: StepProgram, sizes: Mapping[fx.Node, int]) -> None:
        self.step, self.sizes = step, sizes
        self.nodes = list(step.graph.nodes)
        self.place = {node: index for index, node in enumerate(self.nodes)}
        self.returned = set(output_node(step.graph).all_input_nodes)
        self.weights = parameter_expressions(step)
        """Parameters, and what is made of them alone, which is made again for each reader."""

    @cached_property
    def end(self) -> int:
        """The place of the first call of backward: the first one that depends on the loss."""
        loss = self.step.returned()[0]
        return min((self.place[user] for user in loss.users if user.op != "output"), default=len(self.nodes))

    def is_forward(self, node: fx.Node) -> bool:
        """Whether a node is a call of forward."""
        return node.op == "call_function" and self.place[node] < self.end

    def is_free(self, node: fx.Node) -> bool:
        """Whether a value lives anyway, or takes no memory, or is made again anyway."""
        return (
            not self.is_forward(node)
            or node in self.weights
            or node in self.returned
            or not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
        )

    @cached_property
    def layers(self) -> list[Segment]:
        """The repeated layers in their order in forward. Each begins where the fewest bytes cross from what is before."""
        spans, others = self._spans()
        names = sorted(spans, key=lambda name: spans[name])
        names = [
            name
            for index, name in enumerate(names)
            if index == 0 or spans[name][0] > spans[names[index - 1]][1]
        ]
        if not names:
            return []
        first, last = spans[names[0]][0], spans[names[-1]][1]
        before = [place for place in others if place < first]
        after = [place for place in others if place > last]
        cuts = [self._narrowest(max(before, default=0) + 1, first)]
        for one, other in pairwise(names):
            cuts.append(self._narrowest(spans[one][1] + 1, spans[other][0]))
        high = min(after, default=self.end)
        like_before = (
            place for place in range(last + 1, high) if self._crossing[place] <= self._crossing[cuts[-1]]
        )
        cuts.append(next(like_before, self._narrowest(last + 1, high)))
        return [Segment(name, begin, end) for name, begin, end in zip(names, cuts, cuts[1:])]

    def _spans(self) -> tuple[dict[str, tuple[int, int]], list[int]]:
        """The places of the first and last reader in forward of the parameters of each layer, and of readers of others."""
        unit = units(self.step.outline)
        paths = {path for name, path in unit.items() if path != name}
        spans: dict[str, tuple[int, int]] = {}
        others: list[int] = []
        for name, node in self.step.reads().items():
            path = unit.get(name, name)
            for place in self._readers(node):
                if path not in paths:
                    others.append(place)
                    continue
                begin, end = spans.get(path, (place, place))
                spans[path] = min(begin, place), max(end, place)
        return spans, others

    def _readers(self, tensor: fx.Node) -> list[int]:
        """The places of the calls of forward that read a tensor, directly or through what is made of weights alone."""
        found, stack = [], [tensor]
        while stack:
            for user in stack.pop().users:
                if user in self.weights:
                    stack.append(user)
                elif self.is_forward(user):
                    found.append(self.place[user])
        return found

    def _narrowest(self, low: int, high: int) -> int:
        """The place in [low, high] over which the fewest bytes cross in forward; the last one of equal ones."""
        return min(range(max(low, 0), max(high, low) + 1), key=lambda place: (self._crossing[place], -place))

    @cached_property
    def _crossing(self) -> list[int]:
        """For each place: bytes of the values that are made before it, and read in forward at or after it."""
        changes = [0] * (len(self.nodes) + 1)
        for node in self.nodes[: self.end]:
            last = self.last_reader(node)
            if last > self.place[node] and not self.is_free(node):
                changes[self.place[node] + 1] += self.sizes.get(node, 0)
                changes[last + 1] -= self.sizes.get(node, 0)
        total, crossing = 0, []
        for change in changes:
            total += change
            crossing.append(total)
        return crossing

    def last_reader(self, node: fx.Node) -> int:
        """The place of the last call of forward that reads a value; its own if there is none."""
        return max(
            (self.place[user] for user in node.users if self.is_forward(user)), default=self.place[node]
        )
