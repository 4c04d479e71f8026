"""Shard a batch over ranks by rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import TensorSpec


def take_rows(
    inputs: tuple[TensorSpec, ...], batch: Mapping[str, torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """This rank's rows of a whole batch: shards differ by one row at most; inputs without a batch axis stay whole.

    The batch dimension is axis 0 of the first input whose axis 0 is dynamic; every axis of that dimension is sharded.
    Raises InputError, on all ranks, if no input has a dynamic axis 0 or if there are fewer rows than ranks.
    """
    if ranks.size == 1:
        return dict(batch)
    batch_dim = next(
        (spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)), None
    )
    if batch_dim is None:
        raise InputError(
            f"this model has a fixed batch size, so {ranks.size} ranks cannot share a batch: "
            "capture it with a batch of 2 or more, or train on one rank"
        )
    axes = {spec.name: axis for spec in inputs for axis, dim in enumerate(spec.shape) if dim == batch_dim}
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
