"""Remat: keep fewer activations from forward to backward, and compute the others again (Chen et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from bmgraph.errors import InputError, PassError
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import FINAL, Effect, StepPass
from bmgraph.passes.remat.budget import level_within
from bmgraph.passes.remat.choices import Choices
from bmgraph.passes.remat.forward_part import ForwardPart
from bmgraph.passes.remat.recompute import recompute
from bmgraph.training.liveness import fakes_of, simulate
from bmgraph.training.step_plan import rows_of_example, size_text
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.byte_size import bytes_of
from bmgraph.utils.torch_internals import planning_mode

KEEP = ("none", "auto", "layers")


@dataclass(frozen=True, repr=False)
class Remat(StepPass):
    """Compute activations again in backward: "none", "auto", "layers", or as few as a budget such as "2GB" or "512MiB" allows.

    "auto" computes elementwise operators and views again, which costs next to nothing; what is kept are the fewest bytes
    from which these can be computed, by a minimum cut. "layers" keeps what goes into each repeated layer, and computes the
    layer again (about a third more floating-point operations). A budget bounds the predicted peak of this rank's gradient
    phase, with parameters, gradients and optimizer state, as the passes behind this one shard them: first "auto", then as
    many layers as it takes, from the first on, then groups of layers from the input of each group.

    Random operators are never computed again: their masks are kept. Gathered weights are gathered again, as ZeRO does.
    Goes before ZeRO. Losses and gradients stay bit-equal.

    Raises InputError for an option that is none of these, PassError if a budget cannot be met or there are no layers.
    Sources: Chen et al. 2016 (arXiv:1604.06174); the cut: AOTAutograd's min-cut partitioner, Jain et al. 2020
    (arXiv:1910.02653).

    Example:
        >>> Remat("2GB")
        remat{keep="2GB"}
    """

    effect: ClassVar[Effect] = "exact"
    provides: ClassVar[frozenset[str]] = frozenset({"rematerialized"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"rematerialized", "sharded", FINAL})
    may_match_nothing: ClassVar[bool] = True

    keep: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep not in KEEP and self.budget is None:
            raise InputError(
                f"Remat({self.keep!r}): choose one of {', '.join(map(repr, KEEP))}, or a budget such as '2GB' or '512MiB'"
            )

    @property
    def budget(self) -> int | None:
        """The budget in bytes, if there is one."""
        return bytes_of(self.keep)

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Let backward read copies of what is not kept."""
        if self.keep == "none":
            return step
        part = _forward_part(step)
        if self.keep == "layers" and not part.layers:
            raise PassError(
                'no repeated layers were found, which keep="layers" computes again; keep="auto" needs none'
            )
        choices = Choices(part)
        level: int | None = len(part.layers) if self.keep == "layers" else 0
        if self.budget is not None:
            level = level_within(self.budget, step, choices, context)
        if level is None:
            return step
        kept = choices.kept(level)
        before = _bytes_for_backward(part, None)
        after = _bytes_for_backward(part, kept)
        copies = recompute(part, lambda node: node in kept or part.is_free(node))
        if copies:
            what = f"{copies} calls are computed again, {size_text(after)} kept for backward instead of {size_text(before)}"
            context.edited(choices.name(level), what)
        step.graph.lint()
        return step


def _forward_part(step: StepProgram) -> ForwardPart:
    """The forward part, with the sizes of values on a rank's rows of the example, as a pass behind this one shares them."""
    rows = rows_of_example(replace(step, shared=step.ranks.size > 1 and bool(step.rows.axes)))
    mode = planning_mode()
    return ForwardPart(step, simulate(step, rows, fakes_of(step.tensors, mode), mode).sizes)


def _bytes_for_backward(part: ForwardPart, kept: set[fx.Node] | None) -> int:
    """Bytes of the values that backward reads, or of those that are kept for it."""
    if kept is not None:
        return sum(part.sizes[node] for node in kept)
    return sum(
        part.sizes[node]
        for node in part.nodes[: part.end]
        if not part.is_free(node)
        and any(part.place[user] >= part.end for user in node.users if user.op != "output")
    )
