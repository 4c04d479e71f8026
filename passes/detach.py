"""Detach: take deltas off a program again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.deltas.changed_weights import ChangeAt, with_changes
from bmgraph.deltas.family import Delta
from bmgraph.deltas.linear_family import LinearFamily
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.verify.proof import Proof

SLACK = 10
"""How much more than rounding a delta may differ from what its formula gives: its sums have another order."""


@dataclass(frozen=True, repr=False)
class Detach(ModelPass):
    """Take deltas off linears, which then compute what they did before: `LoadDelta` the other way round, as often as wanted.

    targets: globs over module paths. The backbone stays frozen. To exchange a delta, detach it and load another; where rows choose
    and an engine runs, `engine.deltas.swap` does so in place.

    Declined, with the reason: deltas on experts, deltas of which rows choose, prompts.
    Raises PassError where there is no such delta, a glob matches none, or modules of the model were trained whole with it
    (`modules_to_save`), whose old values are not there any more.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Detach, LoRA
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program)
        >>> sorted(bg.Pipeline([Detach()]).run(tuned).parameters)
        ['bias', 'weight']
    """

    effect: ClassVar[Effect] = "intended"

    targets: tuple[str, ...] = ("*",)

    def run(self, program: Program, context: Context) -> Program:
        """Let what reads the totals of deltas read what these change."""
        if program.trained_whole:
            raise PassError(
                f"{', '.join(sorted(program.trained_whole)[:3])} trained whole with the delta, and the old values are not there "
                "any more: take the program from before the delta"
            )
        found = [delta for graph in program.graphs.values() for delta in deltas_of(graph)]
        if not found:
            raise PassError("the program has no delta to detach")
        targets = resolve_patterns(self.targets, [delta.site for delta in found], "targets")
        for name in program.graphs:
            with program.edit(name, by=str(self)) as editor:
                for delta in deltas_of(editor.graph):
                    if not matches(delta.site, targets):
                        continue
                    reason = _why_not(delta)
                    if reason:
                        context.declined(delta.site, reason)
                        continue
                    below: Any = delta.total.args[0]
                    delta.total.replace_all_uses_with(below)
                    tensors = [str(node.target) for node in delta.tensors.values() if node.op == "get_attr"]
                    context.edited(
                        delta.site, f"without its delta of the family {delta.family.name!r}", tensors
                    )
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With the formulas of the deltas applied to its linears again, it must be the program that it was, where these have one."""
        left = {delta.total.name for delta in deltas_of(after.graph)}
        gone = [delta for delta in deltas_of(before.graph) if delta.total.name not in left]
        if len({delta.linear for delta in gone}) < len(gone):
            return  # what several deltas on one linear give together is said by no formula of one of them
        changes = [
            ChangeAt(delta.linear.name, delta.family, delta.change(before), delta.options)
            for delta in gone
            if isinstance(delta.family, LinearFamily)
        ]
        proof.same(
            with_changes(after, changes), before, "with its deltas it is not the program that it was", SLACK
        )


def _why_not(delta: Delta) -> str:
    """Why a delta cannot be taken off; empty where it can."""
    if not isinstance(delta.family, LinearFamily):
        return f"a delta of the family {delta.family.name!r} is more than a change of a linear: take the program from before it"
    return f"its delta is for {delta.bound}" if delta.bound else ""
