"""Buckets: parameters that are gathered and reduced together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.passes.zero.parameter_groups import units
from bmgraph.training.placement import Place, Update
from bmgraph.training.step_program import StepProgram

Kept = tuple[torch.dtype, torch.dtype, torch.device]
"""The dtype of a gradient, and the dtype and device of an optimizer state."""


@dataclass(frozen=True)
class Bucket:
    """Parameters that are gathered and reduced in one collective, laid out in one flat tensor."""

    name: str
    unit: str
    place: Place
    update: Update | None
    """If it is trained."""


def make_buckets(step: StepProgram, values: bool, gradients: bool, states: bool) -> list[Bucket]:
    """The parameters grouped by unit, dtype and whether they train, in the order of the program; only those that train
    if values are not split. The arguments say what is split over the ranks."""
    unit = units(step.outline)
    groups: dict[tuple[str, torch.dtype, Kept | None], list[str]] = {}
    for name in step.outline.parameters:
        kept = _kept(step.updates[name]) if name in step.updates else None
        if kept or values:
            groups.setdefault((unit[name], step.tensors[name].dtype, kept), []).append(name)
    buckets = []
    for (path, dtype, kept), names in groups.items():
        place = Place.pack(((name, step.tensors[name]) for name in names), step.ranks.size, values)
        if kept is None:
            buckets.append(Bucket(f"{path}/{DTYPE_NAMES[dtype]}/frozen", path, place, None))
            continue
        gradient, state, device = kept
        more = "" if state == dtype else f"/{DTYPE_NAMES[state]}"
        update = Update(
            replace(place, split=gradients, dtype=gradient),
            replace(place, split=states, dtype=state, device=device),
        )
        buckets.append(Bucket(f"{path}/{DTYPE_NAMES[dtype]}{more}/trained", path, place, update))
    return buckets


def _kept(update: Update) -> Kept:
    return update.gradient.dtype, update.state.dtype, update.state.device
