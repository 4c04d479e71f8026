"""Shard a batch over ranks by rows, or take the rows that each rank brings."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.training.row_axes import RowAxes
from bmgraph.training.step_program import WHOLE, StepProgram
from bmgraph.utils.digest import digest


def check_shareable(step: StepProgram) -> None:
    """Raise InputError if several ranks cannot share a batch by rows."""
    if step.ranks.size > 1 and not step.rows.axes:
        raise InputError(
            f"{step.ranks.size} ranks cannot share a batch of this model: {step.rows.reason}; if the loss contrasts the rows of a "
            'batch, give it those of all ranks: Torch(gather=("name of output",), loss=function); or train on one rank, or bring '
            'each rank\'s rows by themselves with Torch(batch="rank"): then rows meet only those of their own rank'
        )


def check_divisible(step: StepProgram, parts: int) -> None:
    """Raise InputError if a batch cannot be split into micro-batches by rows."""
    if not step.rows.axes:
        raise InputError(
            f"accumulate={parts}: a batch of this model cannot be split into micro-batches: {step.rows.reason}; train with "
            "accumulate=1, on smaller batches"
        )


def rows_of_rank(
    step: StepProgram, batch: Mapping[str, object], kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checked inputs of a batch, and this rank's rows of them: all that it was given if `kind` is "rank".

    Collective. Raises InputError on all ranks if the batch does not fit the program on one, if the ranks were given
    different batches although each shall hold the whole (of different inputs without rows, if `kind` is "rank"), or if
    there are fewer rows than ranks.
    """
    ranks, axes = step.ranks, step.rows.axes
    with ranks.fail_together():
        outline = step.outline
        checked = check_inputs(outline.inputs, outline.ranges, batch, outline.ignored)
        own = axes if axes else checked  # with no rows known, all inputs may be a rank's own
        compared = checked if kind == WHOLE else {key: checked[key] for key in checked if key not in own}
        found = digest(compared) if ranks.size > 1 and compared else ""
    if step.gathered:
        _check_even(step, checked, kind)
    if not found:
        return checked, checked
    other = ranks.first_different({"batch": bytes.fromhex(found)})
    if other is None:
        return checked, take_rows(step.rows, checked, ranks) if kind == WHOLE else checked
    if kind == WHOLE:
        raise InputError(
            f"rank {other[0]} was given another batch than rank 0: give every rank the whole batch, of which it takes its "
            'rows, or say Torch(batch="rank") if each rank brings rows of its own'
        )
    raise InputError(
        f"rank {other[0]} was given another {' or '.join(map(repr, compared))} than rank 0: ranks bring rows of their own, "
        "but inputs without a batch axis must be the same on all"
    )


def _check_even(step: StepProgram, batch: Mapping[str, torch.Tensor], kind: str) -> None:
    """Raise InputError, on all ranks, unless they have equally many rows to gather; collective."""
    rows, ranks = step.rows.count(batch), step.ranks
    advice = "the loss gathers rows (gather=), of which ranks have equally many: drop the last batch (drop_last=True) or fill it"
    if kind == WHOLE:
        if rows % ranks.size:
            raise InputError(f"a batch of {rows} rows is no multiple of {ranks.size} ranks: {advice}")
        return
    counts = ranks.gather(torch.tensor([rows], device=step.device)).tolist()
    if len(set(counts)) > 1:
        raise InputError(f"ranks have {', '.join(map(str, counts))} rows: {advice}")


def take_rows(rows: RowAxes, batch: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """This rank's rows of a whole batch: shards differ by one row at most; inputs without a batch axis stay whole.

    Raises InputError, on all ranks, if there are fewer rows than ranks.
    """
    count = rows.count(batch)
    if count < ranks.size:
        raise InputError(
            f"a batch of {count} rows cannot be shared by {ranks.size} ranks: give at least {ranks.size} rows"
        )
    return rows.share(batch, ranks.rank, ranks.size)
