"""Runs passes of the step stage, and checks the step graph after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmgraph.errors import BmgraphError, PassError, VerificationError
from bmgraph.ir.pass_record import Record, machine
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.training.step_program import StepProgram


def run_step_passes(step: StepProgram, passes: Sequence[Pass]) -> tuple[StepProgram, tuple[Record, ...]]:
    """The step after all passes, and the record of each. Do not use the given step again: passes take its tensors.

    Raises what a pass raises, prefixed with the pass, and VerificationError where a pass leaves an illegal step.
    """
    records = []
    for item in passes:
        context = Context()
        try:
            made: Any = item.run(step, context)
            if not isinstance(made, StepProgram):
                raise PassError(f"it returned a {type(made).__name__}, not a step")
            check_step(made)
        except BmgraphError as error:
            raise type(error)(f"pass {item}: {error}") from error
        step = made
        records.append(
            Record(
                text=str(item),
                effect=item.effect,
                edits=tuple(context.edits),
                declined=tuple(context.declines),
                provides=tuple(sorted(item.provides)),
                machine=machine(),
            )
        )
    return step, tuple(records)


def check_step(step: StepProgram) -> None:
    """Raise VerificationError unless a step is legal: its graph is well formed, it holds every tensor that it reads, and
    each trained tensor has a gradient of its shape and dtype."""
    try:
        step.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        raise VerificationError(f"the step's graph is not well formed: {error}") from error
    for name, node in step.reads().items():
        if name not in step.tensors:
            raise VerificationError(f"node {node.name} reads {name!r}, which the step does not have")
    returned = step.returned()
    if len(returned) != 2 + len(step.trained) + len(step.writes):
        raise VerificationError(
            f"the step returns {len(returned)} values, its names are {2 + len(step.trained) + len(step.writes)}"
        )
    for name, node in step.gradients().items():
        found, wanted = node.meta["val"], step.tensors[name]
        if tuple(found.shape) != tuple(wanted.shape) or found.dtype != wanted.dtype:
            raise VerificationError(
                f"the gradient of {name!r} is {found.dtype}{list(found.shape)}, the tensor {wanted.dtype}{list(wanted.shape)}"
            )
