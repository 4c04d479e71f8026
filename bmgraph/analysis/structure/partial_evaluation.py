"""Small evaluations of a part of a graph, at small sizes: what a mask hides, which outputs of a linear are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.program import Program

BATCH = 2
LENGTH = 5

LARGEST = 1 << 24
"""Tensors of more elements are not made for an evaluation."""

CUTS = frozenset({"linear", "embedding", "scaled_dot_product_attention"})
"""What is not computed in an evaluation but made up."""

FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, NotImplementedError)
"""What an operator may raise on sizes that the model would not see."""


class Region:
    """Evaluates expressions of one program at BATCH rows of LENGTH positions. What a linear or an embedding gives is
    random, as are parameters: only the way of values through the graph is asked for."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._generator = torch.Generator().manual_seed(0)
        self._sizes = {symbol: self._size(name) for symbol, name in program.symbols.items()}

    def _size(self, name: str) -> int:
        bounds = self._program.ranges.get(name)
        low = bounds.low if bounds else 1
        high = bounds.high if bounds and bounds.high is not None else LENGTH
        return max(low, min(BATCH if name == "batch" else LENGTH, high))

    def value(
        self, node: fx.Node, leaves: Mapping[fx.Node, torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """The value of a node, with `leaves` given; None where it cannot be evaluated."""
        known: dict[fx.Node, Any] = dict(leaves or {})
        try:
            for item in _order(node, known):
                known[item] = self._compute(item, known)
        except FAILURES:
            return None
        result = known[node]
        return result if isinstance(result, torch.Tensor) else None

    def leaf(self, node: fx.Node) -> torch.Tensor:
        """A random tensor of the shape of a node. Raises ValueError where it would be too large."""
        fake = node.meta["val"]
        shape = self.shape(node)
        if torch.Size(shape).numel() > LARGEST:
            raise ValueError(f"{node.name} is too large for an evaluation")
        if not fake.is_floating_point():
            return torch.ones(shape, dtype=fake.dtype)
        return (torch.rand(shape, generator=self._generator) + 0.5).to(fake.dtype)

    def shape(self, node: fx.Node) -> list[int]:
        """The sizes of a node's tensor in an evaluation."""
        return [self.size(size) for size in node.meta["val"].shape]

    def size(self, size: Any) -> int:
        """A size, dynamic ones at their value in an evaluation."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return int(size.node.expr.xreplace(self._sizes))

    def _compute(self, item: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        if item.op == "placeholder" or _is_cut(item):
            return self.leaf(item)
        if item.op == "get_attr":
            return self._tensor(item)
        assert callable(item.target)
        args = fx.map_arg(item.args, lambda old: known[old])
        return item.target(*args, **dict(fx.map_arg(item.kwargs, lambda old: known[old])))

    def _tensor(self, item: fx.Node) -> torch.Tensor:
        """Buffers as they are, since they may hold masks; parameters at random."""
        name = str(item.target)
        buffer = self._program.buffers.get(name)
        if buffer is None or buffer.device.type == "meta":
            return self.leaf(item)
        return buffer.cpu()


def _is_cut(node: fx.Node) -> bool:
    """Whether a node's value is made up rather than computed."""
    return node.op == "call_function" and stem(node) in CUTS


def _order(node: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """What has to be computed for a node, in order."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set(known)
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        item, ready = stack.pop()
        if ready:
            order.append(item)
            continue
        if item in seen:
            continue
        seen.add(item)
        stack.append((item, True))
        if not _is_cut(item):
            stack.extend((source, False) for source in item.all_input_nodes)
    return order
