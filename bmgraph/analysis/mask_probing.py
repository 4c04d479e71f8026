"""Tells which number of an input hides keys by evaluating what attention makes of it, however scores and masks are laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from bmgraph.analysis.structure.attention import visible
from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.value_origins import Core
from bmgraph.ir.program import Program


def hiding_number(program: Program, node: fx.Node, cores: Sequence[Core]) -> int | None:
    """Which of 0 and 1 hides a key where an input [B, S] holds it, in any of the attentions; None where neither does, where both do,
    or where it cannot be evaluated.

    One number is changed at one position of one row: if it hides, the weights of that key become 0, and those of no other key. So
    the axes in front, such as rows and heads in one, do not matter.
    """
    evaluator = PartialEvaluator(program)
    told = {held for held in (0, 1) for core in cores if _hides(evaluator, node, core, held)}
    return told.pop() if len(told) == 1 else None


def _hides(evaluator: PartialEvaluator, node: fx.Node, core: Core, held: int) -> bool:
    shape = evaluator.shape(node)
    plain = torch.full(shape, 1 - held, dtype=node.meta["val"].dtype)
    changed = plain.clone()
    place = shape[1] // 2
    changed[0, place] = held
    before, after = (_seen(evaluator, node, core, value) for value in (plain, changed))
    if before is None or after is None or before.shape != after.shape or before.shape[-1] != shape[1]:
        return False
    gone = before & ~after
    elsewhere = torch.arange(shape[1]) != place
    return bool(gone.any()) and not bool((gone & elsewhere).any())


def _seen(evaluator: PartialEvaluator, node: fx.Node, core: Core, value: torch.Tensor) -> torch.Tensor | None:
    """Which keys get weight, bool[..., keys]; None where it cannot be evaluated."""
    if core.scores is None or core.softmax is None:
        if core.mask is None:
            return None
        mask = evaluator.value(core.mask, {node: value})
        return None if mask is None or not mask.dim() else visible(mask)
    alike = torch.zeros(evaluator.shape(core.scores), dtype=core.scores.meta["val"].dtype)
    weights = evaluator.value(core.softmax, {node: value, core.scores: alike})
    return None if weights is None or not weights.dim() else weights > 0
