"""Shard a batch over ranks by rows, or take the rows that each rank brings."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.utils.digest import digest

WHOLE = "whole"
"""Every rank gives the whole batch to a trainer's `step`; with "rank" each gives rows of its own."""


def rows_of_rank(
    outline: Program, batch: Mapping[str, object], ranks: Ranks, kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checked inputs of a batch, and this rank's rows of them: all that it was given if `kind` is "rank".

    Collective. Raises InputError on all ranks if the batch does not fit the program on one, if the ranks were given
    different batches although each shall hold the whole (of different inputs without rows, if `kind` is "rank"), or if
    the batch cannot be sharded.
    """
    with ranks.fail_together():
        checked = check_inputs(outline.inputs, outline.ranges, batch, outline.ignored)
        compared = checked if kind == WHOLE else _without_rows(outline.inputs, checked)
        found = digest(compared) if ranks.size > 1 and compared else ""
    if not found:
        return checked, checked
    other = ranks.first_different({"batch": bytes.fromhex(found)})
    if other is None:
        return checked, take_rows(outline.inputs, checked, ranks) if kind == WHOLE else checked
    if kind == WHOLE:
        raise InputError(
            f"rank {other[0]} was given another batch than rank 0: give every rank the whole batch, of which it takes its "
            'rows, or say Torch(batch="rank") if each rank brings rows of its own'
        )
    raise InputError(
        f"rank {other[0]} was given another {' or '.join(map(repr, compared))} than rank 0: ranks bring rows of their own, "
        "but inputs without a batch axis must be the same on all"
    )


def take_rows(
    inputs: tuple[TensorSpec, ...], batch: Mapping[str, torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """This rank's rows of a whole batch: shards differ by one row at most; inputs without a batch axis stay whole.

    The batch dimension is axis 0 of the first input whose axis 0 is dynamic; every axis of that dimension is sharded.
    Raises InputError, on all ranks, if no input has a dynamic axis 0 or if there are fewer rows than ranks.
    """
    axes = _batch_axes(inputs)
    if not axes:
        raise InputError(
            f"this model has a fixed batch size, so {ranks.size} ranks cannot share a batch: "
            "capture it with a batch of 2 or more, or train on one rank"
        )
    count = next(batch[name].shape[axis] for name, axis in axes.items())
    if count < ranks.size:
        raise InputError(
            f"a batch of {count} rows cannot be shared by {ranks.size} ranks: give at least {ranks.size} rows"
        )
    begin, end = (count * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return {
        name: value.narrow(axes[name], begin, end - begin) if name in axes else value
        for name, value in batch.items()
    }


def _without_rows(
    inputs: tuple[TensorSpec, ...], batch: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The inputs that hold no rows; none if the batch size is fixed, for then all inputs may."""
    axes = _batch_axes(inputs)
    return {name: value for name, value in batch.items() if axes and name not in axes}


def _batch_axes(inputs: tuple[TensorSpec, ...]) -> dict[str, int]:
    """The axis of rows by name of input; empty if no input has a dynamic axis 0."""
    batch_dim = next(
        (spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)), None
    )
    if batch_dim is None:
        return {}
    return {spec.name: axis for spec in inputs for axis, dim in enumerate(spec.shape) if dim == batch_dim}
