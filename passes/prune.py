"""Prune: N:M structured sparsity, by masks on the weights of linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.weight_sites import Weight, linears, read_elsewhere, unnamed_weights, weight_of
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.verify.measures import Measure, WeightsMoved
from bmgraph.verify.proof import Proof

aten = torch.ops.aten

PATTERNS: dict[str, tuple[int, int]] = {"2:4": (2, 4)}
"""Name of a pattern -> (how many weights are kept, group size)."""

Score = Callable[[torch.Tensor], torch.Tensor]
"""A weight [out, in] -> the importance of each element, [out, in]."""

SCORES: dict[str, Score] = {"magnitude": torch.abs}
"""Name of a score -> the function."""


@dataclass(frozen=True, repr=False)
class Prune(ModelPass):
    """Zero the 2 weights with the lowest score in every group of 4 consecutive input weights of an output.

    pattern: "2:4". score: "magnitude" (the absolute value). include, exclude: globs over module paths.

    A weight becomes `w * mask` with a frozen bool mask: zeros stay zero in training, under a delta, and when the weight
    is quantized before or after. Engines store only the product. Linears whose number of inputs is not a multiple of
    the group size, and weights that another operator reads too (tied embeddings), are declined.

    The two largest of four weights hold at least half of the sum of squares, so no row changes by more than sqrt(1/2)
    (relative L2), and the pipeline enforces this bound. The outputs can drift far unless the model is trained
    afterwards.

    Raises PassError where a glob matches nothing or no site is left. Source: Mishra et al. 2021 (arXiv:2104.08378).

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

    @property
    def measured(self) -> Measure:
        """No row of a weight loses more than half of its sum of squares."""
        return WeightsMoved(0.7072)

    def run(self, program: Program, context: Context) -> Program:
        """Mask the weights of the selected linears."""
        found = {
            weight.site: weight
            for node in linears(program.graph)
            if (weight := weight_of(program, node)) is not None
        }
        include = resolve_patterns(self.include, list(found), "include")
        exclude = resolve_patterns(self.exclude, list(found), "exclude")
        for site, reason in unnamed_weights(program).items():
            if matches(site, include) and not matches(site, exclude):
                context.declined(site, reason)
        with program.edit(by=str(self)) as editor:
            for site, weight in found.items():
                if not matches(site, include) or matches(site, exclude):
                    continue
                reason = self._reason_to_decline(weight)
                if reason:
                    context.declined(site, reason)
                    continue
                self._mask(editor, weight)
                context.edited(site, f"{self.pattern} of its weights by {self.score}")
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Every group must keep its highest scores, as they were, and nothing else."""
        kept, size = PATTERNS[self.pattern]
        old, new = _matrices(before), _matrices(after)
        for site in dict.fromkeys(edit.site for edit in context.edits):
            was, now = (rows[site].reshape(len(rows[site]), -1, size) for rows in (old, new))
            score = SCORES[self.score]
            best = score(was).topk(kept, -1).values.sum(-1)
            if not bool(((now == was) | (now == 0)).all()):
                raise VerificationError(f"{site}: it changed weights that it keeps")
            if bool(((now != 0).sum(-1) > kept).any()):
                raise VerificationError(f"{site}: it keeps more than {kept} weights of a group of {size}")
            if not torch.allclose(torch.where(now != 0, score(was), 0).sum(-1), best):
                raise VerificationError(f"{site}: it drops weights of higher {self.score} than it keeps")

    def _reason_to_decline(self, weight: Weight) -> str:
        """Why a weight cannot be pruned; empty where it can."""
        value = weight.node.meta["val"]
        if not value.is_floating_point() or value.dim() != 2:
            return f"its weight is {value.dtype} of {value.dim()} dimensions"
        _, size = PATTERNS[self.pattern]
        inputs = value.shape[1 - weight.channel_axis]
        if inputs % size:
            return f"its {inputs} inputs are not a multiple of {size}"
        if read_elsewhere(weight):
            return "something else reads its weight too (a tied embedding)"
        return ""

    def _mask(self, editor: Editor, weight: Weight) -> None:
        value = evaluate(editor.program, weight.node)
        rows = value.T if weight.transposed else value
        kept = sparsity_mask(SCORES[self.score](rows), *PATTERNS[self.pattern])
        mask = (kept.T if weight.transposed else kept).contiguous()
        reader = editor.parameter(
            editor.fresh(f"{weight.site}_mask"), mask, like=weight.node, frozen=True, part=NodeRole.MASK
        )
        masked = editor.call(
            aten.mul.Tensor, weight.node, reader,
            like=_first_user(weight.node), site=weight.site, part=NodeRole.WEIGHT,
        )  # fmt: skip
        editor.replace(weight.node, masked)


def _matrices(program: Program) -> dict[str, torch.Tensor]:
    """The weight f[out, in] of each linear, by site, in float32 or more exact."""
    found: dict[str, torch.Tensor] = {}
    for node in linears(program.graph):
        weight = weight_of(program, node)
        if weight is not None and weight.site not in found:
            value = evaluate(program, weight.node)
            found[weight.site] = value.T if weight.transposed else value
    return found


def sparsity_mask(scores: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """bool[out, in]: true for the `kept` highest scores in every `size` consecutive ones of a row; ties keep the first.

    `scores` is f[out, in], `in` a multiple of `size`.
    """
    if scores.device.type == "meta":
        return torch.empty_like(scores, dtype=torch.bool)
    groups = scores.reshape(scores.shape[0], -1, size)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.reshape(scores.shape)


def _first_user(node: fx.Node) -> fx.Node:
    """The user that comes first in the graph."""
    return min(node.users)
