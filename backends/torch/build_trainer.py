"""From a program to its trainer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.pass_manager.step_passes import run_step_passes
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.step_program import StepProgram

if TYPE_CHECKING:
    from bmgraph.backends.torch.backend import Torch


def build_trainer(config: Torch, program: Program, report: Report) -> Trainer:
    """Trace the step, run the passes of the step stage on it, and make it ready to train.

    Raises InputError where the program cannot train and PassError where a pass cannot do its work.
    """
    assert config.optimizer is not None
    begin = time.perf_counter()
    step = trace_step(program, config.loss)
    report.seconds["trace"] = time.perf_counter() - begin
    begin = time.perf_counter()
    step, records = run_step_passes(step, config.passes)
    report.seconds["step passes"] = time.perf_counter() - begin
    report.records = (*report.records, *records)
    report.notes.append(_note(step))
    return Trainer(
        step,
        config.optimizer,
        schedule=config.schedule,
        clip_norm=config.clip_norm,
        seed=config.seed,
        report=report,
    )


def _note(step: StepProgram) -> str:
    """What a reader of the report should know of the step."""
    parameters = step.outline.parameters
    trained = sum(parameters[name].numel() for name in step.trained_parameters)
    total = sum(tensor.numel() for tensor in parameters.values())
    local = (
        "; statistics of norms are local to each rank" if step.ranks.size > 1 and step.outline.writes else ""
    )
    return f"trainer: {trained:,} of {total:,} parameters train, on {step.ranks.size} rank(s){local}"
