"""Traces where each output element of a data movement comes from, by running the operator on index numbers."""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.partial_evaluation import FAILURES, MAX_ELEMENTS, PartialEvaluator
from bmgraph.ir.evaluation import run_call
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

PROBES = (0, 1)
"""Values given to index tensors that depend on an input. If the results differ, the movement depends on the input."""


class IndexTracer:
    """Traces the data movements of one program at small sizes."""

    def __init__(self, program: Program, evaluator: PartialEvaluator) -> None:
        self._program = program
        self._evaluator = evaluator
        self._cache: dict[tuple[fx.Node, fx.Node, int], torch.Tensor | None] = {}

    def source_indices(self, node: fx.Node, source: fx.Node, dim: int) -> torch.Tensor | None:
        """For each output element of `node`, the index along `dim` of `source` that it comes from; -1 if it comes from
        elsewhere. None if unknown: it depends on the input, or the operator cannot be run at these sizes."""
        key = (node, source, dim)
        if key not in self._cache:
            self._cache[key] = self._trace(node, source, dim)
        return self._cache[key]

    def _trace(self, node: fx.Node, source: fx.Node, dim: int) -> torch.Tensor | None:
        shape = self._evaluator.shape(source)
        if torch.Size(shape).numel() > MAX_ELEMENTS:
            return None
        # Numbered from 1, so that padding (0) differs from the first element.
        numbers = torch.arange(1, shape[dim] + 1).reshape(
            [-1 if axis == dim else 1 for axis in range(len(shape))]
        )
        results = [self._run(node, {source: numbers.expand(shape)}, probe) for probe in PROBES]
        valid = [item for item in results if item is not None]
        if not valid or (len(valid) == 2 and not torch.equal(*valid)):
            return None
        return valid[0] - 1

    def _run(self, node: fx.Node, values: dict[fx.Node, torch.Tensor], probe: int) -> torch.Tensor | None:
        def value(item: fx.Node) -> Any:
            if item in values:
                return values[item]
            fake = item.meta["val"]
            if not isinstance(fake, torch.Tensor):
                return self._evaluator.size(fake)
            if fake.is_floating_point():
                return torch.zeros(self._evaluator.shape(item), dtype=torch.int64)
            constant = self.constant(item)
            return constant if constant is not None else torch.full(self._evaluator.shape(item), probe)

        try:
            result = run_movement(node, value)
        except FAILURES:
            return None
        return result if isinstance(result, torch.Tensor) else None

    def constant(self, item: fx.Node) -> torch.Tensor | None:
        """The value of an integer parameter or buffer, such as the indices of a gather; None for other nodes."""
        if item.op != "get_attr":
            return None
        tensor = self._program.tensor(str(item.target))
        return None if tensor.is_floating_point() or tensor.device.type == "meta" else tensor.cpu()


def run_movement(node: fx.Node, value: Any) -> Any:
    """Run one call on given argument values; a getitem runs the split that it reads too."""
    if node.target is not getitem:
        return run_call(node, value)
    split, index = node.args
    assert isinstance(split, fx.Node)
    return run_call(split, value)[index]


def is_movement(node: fx.Node) -> bool:
    """Whether a node only moves elements. For a split, the getitem nodes count as the movements.

    Not roll or flip: with some elements removed they would move the rest elsewhere.
    """
    if node.target is getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and traits_of(source).kind is Kind.SPLIT
    if node.target is torch.ops.aten.squeeze.default:
        return False  # it would drop another dimension once that has one element left
    return traits_of(node).traced and traits_of(node).kind is not Kind.SPLIT


def moved_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensors whose elements are moved: the indexed tensor, not the indices."""
    call: Any = node.args[0] if node.target is getitem else node
    first = call.args[0]
    return list(dict.fromkeys(first)) if isinstance(first, (list, tuple)) else [first]
