"""Runs passes of the step stage, and checks the step graph after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bmgraph.errors import BmgraphError, PassError, VerificationError
from bmgraph.ir.pass_record import Record, machine
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.pass_manager import Verify
from bmgraph.training.step_program import StepProgram
from bmgraph.verify.step_check import StepReference
from bmgraph.verify.update_check import check_places


def run_step_passes(
    step: StepProgram,
    passes: Sequence[Pass],
    example: Mapping[str, torch.Tensor] | None = None,
    verify: Verify = "numeric",
) -> tuple[StepProgram, tuple[Record, ...]]:
    """The step after all passes, and the record of each. Do not use the given step again: passes take its tensors.

    On the batch `example`, an exact pass must leave loss, gradients and updates as they are on all ranks together.
    Raises what a pass raises, prefixed with the pass, and VerificationError where a pass leaves an illegal or another step.
    """
    records = []
    compares = verify == "numeric" and any(item.effect == "exact" for item in passes)
    reference = StepReference.take(step, example or {}) if compares else None
    for item in passes:
        context = Context()
        compared = "not compared"
        try:
            made: Any = item.run(step, context)
            if not isinstance(made, StepProgram):
                raise PassError(f"it returned a {type(made).__name__}, not a step")
            if verify != "off":
                check_step(made)
            if reference is not None and item.effect == "exact":
                compared = _compared(reference, made)
        except VerificationError as error:
            raise VerificationError(f"pass {item} was stopped: {error}") from error
        except BmgraphError as error:
            raise type(error)(f"pass {item}: {error}") from error
        step = made
        if reference is not None and item.effect != "exact":
            reference = StepReference.take(step, example or {})
        records.append(
            Record(
                text=str(item),
                effect=item.effect,
                edits=tuple(context.edits),
                declined=tuple(context.declines),
                provides=tuple(sorted(item.provides)),
                compared=compared,
                machine=machine(),
            )
        )
    return step, tuple(records)


def _compared(reference: StepReference, step: StepProgram) -> str:
    """What was compared; what fails on one rank alone is a VerificationError on all."""
    try:
        return reference.check(step)
    except VerificationError:
        raise
    except BmgraphError as error:
        raise VerificationError(str(error)) from error


def check_step(step: StepProgram) -> None:
    """Raise VerificationError unless a step is legal: its graph is well formed, it holds every tensor that it reads, and
    values, gradients and optimizer states are where they are said to be."""
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
    check_places(step)
