"""Operators that only move elements: where each element of their output comes from, read by running them on numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.partial_evaluation import FAILURES, LARGEST, Region
from bmgraph.analysis.structure.value_origins import CUTS, JOINS, stem
from bmgraph.ir.program import Program

MOVEMENTS = CUTS | JOINS | frozenset(
    {
        "reshape", "view", "transpose", "permute", "t", "unsqueeze", "expand", "flatten", "unflatten", "repeat",
        "repeat_interleave", "constant_pad_nd", "slice", "select", "index", "narrow", "gather", "index_select",
    }
)  # fmt: skip
"""What is understood by running it. Not among them: what moves elements otherwise when some are missing (roll, flip)."""

ALWAYS_MOVED = (0, 1)
"""What indices that an input decides are set to; what differs between the two is moved by them."""


class Movement:
    """Evaluates movements of one program at small sizes."""

    def __init__(self, program: Program, region: Region) -> None:
        self._program = program
        self._region = region
        self._known: dict[tuple[fx.Node, fx.Node, int], torch.Tensor | None] = {}

    def coordinates(self, node: fx.Node, source: fx.Node, dim: int) -> torch.Tensor | None:
        """For every element of the output of `node`, the index along `dim` of `source` that it came from; -1 where it came
        from elsewhere. None where that cannot be told: it depends on the input, or the operator cannot be run."""
        key = (node, source, dim)
        if key not in self._known:
            self._known[key] = self._trace(node, source, dim)
        return self._known[key]

    def _trace(self, node: fx.Node, source: fx.Node, dim: int) -> torch.Tensor | None:
        shape = self._region.shape(source)
        if torch.Size(shape).numel() > LARGEST:
            return None
        # Numbered from 1, so that what a padding adds (0) is told from the first element.
        numbers = torch.arange(1, shape[dim] + 1).reshape(
            [-1 if axis == dim else 1 for axis in range(len(shape))]
        )
        found = [self._run(node, {source: numbers.expand(shape)}, decided) for decided in ALWAYS_MOVED]
        known = [item for item in found if item is not None]
        if not known or (len(known) == 2 and not torch.equal(*known)):
            return None
        return known[0] - 1

    def _run(self, node: fx.Node, values: dict[fx.Node, torch.Tensor], decided: int) -> torch.Tensor | None:
        def value(item: fx.Node) -> Any:
            if item in values:
                return values[item]
            fake = item.meta["val"]
            if not isinstance(fake, torch.Tensor):
                return self._region.size(fake)
            if fake.is_floating_point():
                return torch.zeros(self._region.shape(item), dtype=torch.int64)
            constant = self.constant(item)
            return constant if constant is not None else torch.full(self._region.shape(item), decided)

        try:
            result = run(node, value)
        except FAILURES:
            return None
        return result if isinstance(result, torch.Tensor) else None

    def constant(self, item: fx.Node) -> torch.Tensor | None:
        """The value of a parameter or buffer that holds whole numbers, such as positions to take."""
        if item.op != "get_attr":
            return None
        tensor = self._program.tensor(str(item.target))
        return None if tensor.is_floating_point() or tensor.device.type == "meta" else tensor.cpu()


def run(node: fx.Node, value: Any) -> Any:
    """A call on the values of its arguments; the part of a split is run as one call."""
    call = node
    if stem(node) == "getitem":
        call = node.args[0]  # type: ignore[assignment]
    assert callable(call.target)
    result = call.target(*fx.map_arg(call.args, value), **dict(fx.map_arg(call.kwargs, value)))
    return result[node.args[1]] if call is not node else result


def moves(node: fx.Node) -> bool:
    """Whether a node only moves elements; a split moves them where its parts are taken."""
    if node.op != "call_function":
        return False
    if stem(node) == "getitem":
        source = node.args[0]
        return isinstance(source, fx.Node) and stem(source) in CUTS
    return stem(node) in MOVEMENTS and stem(node) not in CUTS


def sources(node: fx.Node) -> list[fx.Node]:
    """The tensors whose elements a movement moves: what is indexed, not the indices."""
    call: Any = node.args[0] if stem(node) == "getitem" else node
    first = call.args[0]
    return list(dict.fromkeys(first)) if isinstance(first, (list, tuple)) else [first]
