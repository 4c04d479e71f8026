"""Prune: of every few weights in a row that meet neighbouring inputs, only the largest stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import check_patterns, matches
from bmgraph.analysis.weight_sites import Weight, linears, read_elsewhere, weight_of
from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass

aten = torch.ops.aten

PATTERNS: dict[str, tuple[int, int]] = {"2:4": (2, 4)}
"""Name of a pattern -> (how many stay, of how many)."""

Score = Callable[[torch.Tensor], torch.Tensor]
"""A weight [out, in] -> what each of its elements is worth, [out, in]."""

SCORES: dict[str, Score] = {"magnitude": torch.abs}
"""Name of a score -> the score."""


@dataclass(frozen=True, repr=False)
class Prune(Pass):
    """Set to zero, in every group of 4 weights of an output that meet neighbouring inputs, the 2 that are worth least.

    pattern: "2:4". score: "magnitude" (the absolute value). include, exclude: globs over module paths.

    A weight becomes `w * mask`, and the mask, bool, is frozen: what is zero stays zero through training, beside a delta
    and when the weight is quantised, before or after. Engines hold the product alone. Linears whose inputs are no whole
    number of groups, and those whose weight something else reads too (tied embeddings), are declined.

    The two largest of four hold at least half of their squares, so no row moves by more than sqrt(1/2) of itself
    (relative L2); the pipeline holds the pass to that. What it does to the outputs depends on the model: much, where it
    was not trained afterwards.

    Raises PassError where a glob fits nothing or no site is left. Source: Mishra et al. 2021 (arXiv:2104.08378).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Prune
        >>> program = bg.capture(torch.nn.Linear(8, 4), (torch.randn(3, 8),))
        >>> pruned = bg.Pipeline([Prune()]).run(program)
        >>> pruned.parameters["weight_mask"].sum(1).tolist()
        [4, 4, 4, 4]
    """

    effect: ClassVar[Effect] = "approximate"
    provides: ClassVar[frozenset[str]] = frozenset({"pruned"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"pruned"})
    default_drift: ClassVar[float] = 1.5
    weight_drift: ClassVar[float | None] = 0.7072

    pattern: str = "2:4"
    score: str = "magnitude"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise InputError(f"pattern={self.pattern!r}: choose one of {', '.join(PATTERNS)}")
        if self.score not in SCORES:
            raise InputError(f"score={self.score!r}: choose one of {', '.join(SCORES)}")

    def run(self, program: Program, context: Context) -> Program:
        """Mask the weights of the linears of a program."""
        found = {
            weight.site: weight
            for node in linears(program.graph)
            if (weight := weight_of(program, node)) is not None
        }
        check_patterns((*self.include, *self.exclude), list(found), "include or exclude")
        with program.edit(by=str(self)) as editor:
            for site, weight in found.items():
                if not matches(site, self.include) or matches(site, self.exclude):
                    continue
                reason = self._unfit(weight)
                if reason:
                    context.declined(site, reason)
                    continue
                self._mask(editor, weight)
                context.edited(site, f"{self.pattern} of its weights by {self.score}")
        return program

    def _unfit(self, weight: Weight) -> str:
        """Why a weight is left alone; empty where it is not."""
        value = weight.node.meta["val"]
        if not value.is_floating_point() or value.dim() != 2:
            return f"its weight is {value.dtype} of {value.dim()} dimensions"
        _, size = PATTERNS[self.pattern]
        inputs = value.shape[1 - weight.channel_axis]
        if inputs % size:
            return f"its {inputs} inputs are no whole number of groups of {size}"
        if read_elsewhere(weight):
            return "something else reads its weight too (a tied embedding)"
        return ""

    def _mask(self, editor: Editor, weight: Weight) -> None:
        value = evaluate(editor.program, weight.node)
        rows = value.T if weight.transposed else value
        kept = largest(SCORES[self.score](rows), *PATTERNS[self.pattern])
        mask = (kept.T if weight.transposed else kept).contiguous()
        reader = editor.parameter(
            editor.fresh(f"{weight.site}_mask"), mask, like=weight.node, frozen=True, part="mask"
        )
        masked = editor.call(
            aten.mul.Tensor, weight.node, reader,
            like=_first_user(weight.node), site=weight.site, part="weight",
        )  # fmt: skip
        editor.replace(weight.node, masked)


def largest(worth: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """bool[out, in]: the `kept` that are worth most in every `size` neighbours of a row; the first where they are equal.

    `worth` is f[out, in], `in` a multiple of `size`.
    """
    if worth.device.type == "meta":
        return torch.empty_like(worth, dtype=torch.bool)
    groups = worth.reshape(worth.shape[0], -1, size)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.reshape(worth.shape)


def _first_user(node: fx.Node) -> fx.Node:
    """The user that comes first in the graph."""
    return min(node.users)
