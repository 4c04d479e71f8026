"""Evaluates parts of a graph at small sizes, to learn what a mask hides or which outputs of a linear are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from bmgraph.ir.evaluation import COMPUTED, value_of
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import row_sizes
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

BATCH = 2
"""Value of the batch size."""

LENGTH = 5
"""Value of every other dynamic size."""

MAX_ELEMENTS = 1 << 24
"""Random tensors with more elements are not created."""

RANDOMIZED = frozenset({Kind.LINEAR, Kind.EMBEDDING, Kind.ATTENTION})
"""Calls that are not computed: random values stand in for their outputs."""

FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, NotImplementedError)
"""What an operator may raise at sizes that the model does not support."""


class PartialEvaluator:
    """Evaluates expressions of one program at BATCH rows of LENGTH positions.

    Parameters, inputs and outputs of linears, embeddings and attentions are random (integer ones are 1), since only the
    path of values through the graph matters. Buffers keep their values, since they may hold masks.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._generator = torch.Generator().manual_seed(0)
        self._rows = row_sizes(program.inputs)
        self._sizes = {symbol: self._size(name) for symbol, name in program.symbols.items()}

    def _size(self, name: str) -> int:
        bounds = self._program.ranges.get(name)
        low = bounds.low if bounds else 1
        high = bounds.high if bounds and bounds.high is not None else LENGTH
        return max(low, min(BATCH if name in self._rows else LENGTH, high))

    def value(
        self, node: fx.Node, leaves: Mapping[fx.Node, torch.Tensor] | None = None
    ) -> torch.Tensor | None:
        """The value of a node, given the values of `leaves`; None if it cannot be evaluated."""
        given = dict(leaves or {})
        try:
            result = value_of(node, lambda item: given[item] if item in given else self._leaf(item))
        except FAILURES:
            return None
        return result if isinstance(result, torch.Tensor) else None

    def leaf(self, node: fx.Node) -> torch.Tensor:
        """A random tensor with the shape of a node (ones for integers). Raises ValueError above MAX_ELEMENTS."""
        fake = node.meta["val"]
        shape = self.shape(node)
        if torch.Size(shape).numel() > MAX_ELEMENTS:
            raise ValueError(f"{node.name} has {torch.Size(shape).numel()} elements: too large to evaluate")
        if not fake.is_floating_point():
            return torch.ones(shape, dtype=fake.dtype)
        return (torch.rand(shape, generator=self._generator) + 0.5).to(fake.dtype)

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's tensor in an evaluation."""
        return [self.size(size) for size in node.meta["val"].shape]

    def size(self, size: Any) -> int:
        """A size; a dynamic one at its value in an evaluation."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return int(size.node.expr.xreplace(self._sizes))

    def _leaf(self, item: fx.Node) -> Any:
        if item.op == "placeholder" or _is_randomized(item):
            return self.leaf(item)
        return self._tensor(item) if item.op == "get_attr" else COMPUTED

    def _tensor(self, item: fx.Node) -> torch.Tensor:
        """A buffer with its values; random values for parameters and tensors on meta."""
        name = str(item.target)
        buffer = self._program.buffers.get(name)
        if buffer is None or buffer.device.type == "meta":
            return self.leaf(item)
        return buffer.cpu()


def _is_randomized(node: fx.Node) -> bool:
    """Whether random values stand in for a node's output."""
    return traits_of(node).kind in RANDOMIZED
