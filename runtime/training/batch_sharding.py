"""Which rows of a batch a rank takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import InputError
from bmgraph.ir.tensor_spec import TensorSpec


def take_rows(
    inputs: tuple[TensorSpec, ...], batch: Mapping[str, torch.Tensor], ranks: Ranks
) -> dict[str, torch.Tensor]:
    """This rank's rows of the whole batch: as even as can be, at least one each; inputs without rows are kept whole.

    The rows are the first size of the first input that leaves its first size free. Raises InputError, on every rank
    alike, where the model fixes that size or there are fewer rows than ranks.
    """
    if ranks.size == 1:
        return dict(batch)
    rows = next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], str)), None)
    if rows is None:
        raise InputError(
            f"this model fixes the size of its batch, so {ranks.size} ranks cannot share one: "
            "capture it with a batch of 2 or more, or train on one rank"
        )
    places = {spec.name: axis for spec in inputs for axis, dim in enumerate(spec.shape) if dim == rows}
    count = next(batch[name].shape[axis] for name, axis in places.items())
    if count < ranks.size:
        raise InputError(
            f"a batch of {count} rows cannot be shared by {ranks.size} ranks: give at least {ranks.size} rows"
        )
    begin, end = (count * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    return {
        name: value.narrow(places[name], begin, end - begin) if name in places else value
        for name, value in batch.items()
    }
