"""Finds how much has to be computed again for a step to stay within a budget of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import fx

from bmgraph.distributed.process_group import SilentRanks
from bmgraph.errors import PassError
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.passes.remat.choices import Choices
from bmgraph.passes.remat.forward_part import ForwardPart
from bmgraph.passes.remat.recompute import recompute
from bmgraph.training.collectives import Buffers
from bmgraph.training.liveness import fakes_of, simulate
from bmgraph.training.step_plan import rows_of_example, size_text
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.graph_copies import copy_nodes
from bmgraph.utils.torch_internals import planning_mode


def level_within(budget: int, step: StepProgram, choices: Choices, context: Context) -> int | None:
    """The lowest level of choices whose predicted peak is within a budget; None if nothing has to be computed again.

    Raises PassError if no level is.
    """
    peaks: dict[int, int] = {}

    def fits(level: int) -> bool:
        if level not in peaks:
            kept = None if level < 0 else choices.kept(level)
            peaks[level] = predicted_peak(step, choices.part, kept, context)
        return peaks[level] <= budget

    if fits(-1):
        return None
    if fits(0):
        return 0
    if choices.layers and fits(choices.layers):
        return _lowest(fits, 0, choices.layers)
    for level in range(choices.layers + 1, choices.layers + 1 + len(choices.groups)):
        if fits(level):
            return level
    raise PassError(
        f"the predicted peak of this rank is {size_text(min(peaks.values()))} at best, above the budget of "
        f"{size_text(budget)}: give more memory, a smaller batch, more ranks or a higher stage of ZeRO"
    )


def _lowest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The lowest level above `low` that fits, where `high` does and higher levels need less."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def predicted_peak(step: StepProgram, part: ForwardPart, kept: set[fx.Node] | None, context: Context) -> int:
    """The most bytes that live in the gradient phase, with the optimizer's state, after the passes that follow.

    The step stays as it is: a copy without data is rewritten. `kept`: what backward does not compute again; None: all.
    """
    copies: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(copy_nodes(graph, step.graph, copies))
    mode = planning_mode()
    planned = replace(
        step,
        graph=graph,
        tensors=fakes_of(step.tensors, mode),
        masters=fakes_of(step.masters, mode),
        places=dict(step.places),
        updates=dict(step.updates),
        ranks=SilentRanks(step.ranks.rank, step.ranks.size),
    )
    if kept is not None:
        copied = ForwardPart(
            planned, {copies[node]: size for node, size in part.sizes.items() if node in copies}
        )
        chosen = {copies[node] for node in kept}
        recompute(copied, lambda node: node in chosen or copied.is_free(node))
    for item in context.following:
        assert isinstance(item, StepPass), "behind a pass of the step stage are only such"
        planned = item.run(planned, Context(dict(context.resources), context.target))
    mode = planning_mode()
    buffers = Buffers()
    rows, tensors = rows_of_example(planned), fakes_of(planned.tensors, mode)
    run = simulate(planned, rows, tensors, mode, None, buffers, planned.updates_in_backward)
    return max(point.total for point in run.points) + planned.state_bytes + buffers.nbytes
