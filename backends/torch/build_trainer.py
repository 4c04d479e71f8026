"""Build a trainer: trace the step graph, then run the step passes on it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bmgraph.distributed.connect import connect
from bmgraph.distributed.process_group import Ranks
from bmgraph.ir.joined_graphs import join
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_manager import PassManager
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.optimizers import Optimizer
from bmgraph.training.step_program import StepProgram
from bmgraph.training.weight_digests import complete_digests
from bmgraph.utils.collecting import is_large
from bmgraph.utils.host_memory import give_back_memory
from bmgraph.utils.stored_tensor import left_in_file
from bmgraph.verify.trace_check import check_trace

if TYPE_CHECKING:
    from bmgraph.backends.torch.backend import Torch
    from bmgraph.runtime.engine_base import Engine


def build_trainer(
    config: Torch[Engine | Trainer],
    optimizer: Optimizer,
    program: Program,
    report: Report,
    manager: PassManager,
) -> Trainer:
    """Trace the training step of a program, with all its graphs in one, run the configured step passes on it, and return its
    trainer.

    Writes times, pass records and a note to `report`. Raises InputError if the program cannot be trained, PassError if a
    step pass fails.
    """
    start = time.perf_counter()
    large = is_large(program.parameters.values())
    if large:
        give_back_memory()  # what the proofs of capture took
    ranks = connect(config.timeout)
    with ranks.fail_together():  # tracing is not collective
        joined, parts = join(_left_in_files(program, ranks))
        step = trace_step(
            joined, config.loss, config.batch, config.accumulate, config.numbers, gather=config.gather
        )
        if manager.verify == "numeric" and ranks.rank == 0:  # all ranks have traced the same
            report.notes.append(check_trace(step, joined, config.loss))
    complete_digests(step)
    step.moments = optimizer.kept_moments
    step.updates_in_backward = config.optimizer_in_backward and config.accumulate == 1
    report.seconds["trace"] = time.perf_counter() - start
    start = time.perf_counter()
    step = manager.run(config.passes, step)
    report.seconds["step passes"] = time.perf_counter() - start
    report.records = (*report.records, *step.history)
    report.notes.append(_summary(step, config.accumulate))
    if large:
        give_back_memory()  # tracing leaves cycles that keep the weights of a model that nobody else holds
    return Trainer(
        step,
        optimizer,
        schedule=config.schedule,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        loss_scale=config.loss_scale,
        on_nan=config.on_nan,
        max_skips=config.max_skips,
        seed=config.seed,
        batch=config.batch,
        timeout=config.timeout,
        optimizer_in_backward=config.optimizer_in_backward,
        torch_compile=config.torch_compile,
        parts=parts,
        report=report,
    )


def _left_in_files(program: Program, ranks: Ranks) -> Program:
    """The program with those parameters in files that are there unchanged, on several ranks: each reads its shards alone."""
    if ranks.size == 1:
        return program
    found = program.clone()
    found.parameters = {name: left_in_file(tensor) for name, tensor in program.parameters.items()}
    return found


def _summary(step: StepProgram, accumulate: int) -> str:
    """One line for the report: trained parameters, ranks, and which statistics stay local to a rank or micro-batch."""
    parameters = step.outline.parameters
    trained = sum(parameters[name].numel() for name in step.trained_parameters)
    total = sum(tensor.numel() for tensor in parameters.values())
    notes = [f"{trained:,} of {total:,} parameters train, on {step.ranks.size} rank(s)"]
    if (step.ranks.size > 1 or accumulate > 1) and step.rows.statistics:
        places = step.rows.statistics
        more = f" and {len(places) - 3} more" if len(places) > 3 else ""
        notes.append(
            f"statistics are of each {'micro-batch' if accumulate > 1 else 'rank'}'s own rows in {', '.join(map(repr, places[:3]))}{more}"
        )
    elif step.ranks.size > 1 and step.outline.writes:
        notes.append("norm statistics are local to each rank")
    if step.gathered:
        names = ", ".join(map(repr, step.gathered))
        notes.append(
            f"the loss reads the rows of all ranks of {names}; evaluate() contrasts within each batch"
        )
    if step.by_part:
        what = ", ".join(step.by_part)
        notes.append(f"each rank and micro-batch computes by itself, and all are averaged: {what}")
    return f"trainer: {'; '.join(notes)}"
