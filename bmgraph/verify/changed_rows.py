"""The ids whose rows of a table a pass changed: no batch of ordinary size holds all ids of a large vocabulary."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.reference_outputs import exact_bounds


def batch_of_changed_rows(
    before: Program, after: Program, batch: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The batch with ids of rows that differ between two programs in the place of all ids; None if no row differs.

    Every input is filled that may hold any row of a table whose values differ by more than rounding.
    """
    bound = min(exact_bounds(before).values(), default=1e-5)
    filled = dict(batch)
    for name, old in before.parameters.items():
        new = after.parameters.get(name)
        if new is None or new is old or new.shape != old.shape or old.dim() != 2 or old.device.type == "meta":
            continue
        if relative_error(new, old) == 0:
            continue
        moved = (new - old).double().norm(dim=1) > bound * old.double().norm(dim=1).clamp(min=1e-30)
        rows = moved.nonzero().flatten()
        for spec in before.inputs:
            value = filled[spec.name]
            if spec.values == (0, len(old) - 1) and len(rows) and value.numel():
                places = torch.arange(value.numel(), device=value.device) % len(rows)
                filled[spec.name] = rows.to(value.device)[places].reshape(value.shape).to(value.dtype)
    changed = any(filled[name] is not batch[name] for name in batch)
    return filled if changed else None
