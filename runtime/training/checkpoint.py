"""Resumes a trainer from a checkpoint, whose tensors are by parameter name: any number of ranks can, at any stage of ZeRO.

Every rank reads its shards from the files of all (`checkpoint_layout.py`). Of frozen parameters a checkpoint has only the
digests: a trainer with other frozen parameters is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bmgraph.errors import BundleError
from bmgraph.runtime.training.checkpoint_fit import (
    COMPUTATION_FILE,
    changed_ranks,
    changed_settings,
    check_computation,
    check_moments,
    check_names,
    new_moments,
)
from bmgraph.runtime.training.checkpoint_layout import (
    STATE_FILE,
    frozen_parameters,
    keys_of,
    places_of,
    stored,
)
from bmgraph.runtime.training.checkpoint_reader import StateReader, open_state
from bmgraph.runtime.training.checkpoint_sections import checked_sections
from bmgraph.runtime.training.checkpoint_values import VALUE, check_values
from bmgraph.serialize.bundle import Bundle, read_bundle
from bmgraph.training.executor import written_in_place
from bmgraph.training.fp32_form import HALVES
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

__all__ = ["COMPUTATION_FILE", "STATE_FILE", "load_trainer"]

MOST_STEPS = 2**53
"""Up to here a float counts steps, as optimizers of torch do."""


def load_trainer(trainer: Trainer, path: Path) -> None:
    """Resume a trainer from a checkpoint; raises BundleError on all ranks, and changes nothing, if it does not fit."""
    state = trainer.state
    values: dict[str, dict[str, torch.Tensor]] = {}
    with state.ranks.fail_together():  # reading is not collective
        bundle = read_bundle(path)
        moments = _check(trainer, bundle)
        told = check_computation(trainer, bundle)
        with open_state(bundle) as reader:
            check_names(bundle, reader.names, keys_of(trainer, moments))
            for name in stored(state):
                places = places_of(trainer, name, moments)
                values[name] = {
                    key: place.take(state.ranks.rank, _reader(state, reader, key, place))
                    for key, place in places.items()
                }
        _check_constants(state, {name: loaded[VALUE] for name, loaded in values.items()})
        check_values(trainer, path, values)
        for name in state.trained if not moments else ():
            values[name] |= new_moments(trainer, bundle, name)
        told += [*changed_settings(trainer, bundle), *changed_ranks(trainer, bundle)]
        takes = checked_sections(trainer.sections, bundle, told)
    other = state.ranks.first_different({"checkpoint": bundle.digest})
    if other is not None:
        raise BundleError(
            f"rank {other[0]} read another checkpoint from {path} than rank 0: it was saved anew meanwhile, or is another "
            "folder there; load it again"
        )
    for name, loaded in values.items():
        value = loaded.pop(VALUE)
        if name in state.updates:
            trainer.update.resume(name, value, loaded)
        else:
            state.tensors[name].copy_(value)
    trainer.steps, trainer.seed = bundle.manifest["steps"], bundle.manifest["seed"]
    trainer.update.count = trainer.steps if trainer.update.moments[state.trained[0]] else 0
    for take in takes:
        take()
    trainer.report.notes += told
    for text in told:  # last: a user may have warnings raised
        warnings.warn(text, stacklevel=4)


def _check_constants(state: StepProgram, loaded: dict[str, torch.Tensor]) -> None:
    """Raise BundleError if a buffer that no step changes (angles of positions, a mask) has other values.

    They may differ by rounding, since another machine may have computed them.
    """
    ruled = (name for rule in state.outline.step_rules for name in rule.written)
    changing = {*state.writes, *written_in_place(state), *ruled}
    for name, value in loaded.items():
        mine = state.tensors[name]
        if name not in state.outline.buffers or name in changing:
            continue
        same = (
            torch.allclose(value, mine, rtol=1e-4, atol=1e-6, equal_nan=True)
            if value.is_floating_point()
            else torch.equal(value, mine)
        )
        if not same:
            raise BundleError(
                f"the checkpoint was trained on another program: buffer {name!r} has other values than this program's"
            )


def _check(trainer: Trainer, bundle: Bundle) -> list[str]:
    """The moments in a checkpoint; raises BundleError unless it is one of this program and optimizer."""
    state, manifest = trainer.state, bundle.manifest
    if bundle.kind != "trainer":
        raise BundleError(f"{bundle.path} is a saved {bundle.kind}, not a training checkpoint")
    moments, frozen = manifest.get("moments"), manifest.get("frozen")
    has_integers = all(type(manifest.get(key)) is int for key in ("steps", "seed"))
    if not (has_integers and isinstance(moments, list) and isinstance(frozen, dict)):
        raise BundleError(f"the manifest of {bundle.path} does not describe a checkpoint")
    if not 0 <= manifest["steps"] <= MOST_STEPS:
        raise BundleError(
            f"{bundle.path} says that it was saved after fewer than 0 steps, or more than 2**53"
        )
    kind = type(trainer.optimizer).__name__
    if manifest.get("optimizer") != kind:
        raise BundleError(
            f"{bundle.path} was saved with {manifest.get('optimizer')}, this trainer has {kind}: use the same optimizer"
        )
    check_moments(trainer, bundle)
    mine = {name: item.hex() for name, item in state.digests.items() if name in frozen_parameters(state)}
    for name in sorted({*mine, *frozen}):
        if mine.get(name) != frozen.get(name):
            raise BundleError(
                f"{bundle.path} was trained on another program: frozen parameter {name!r} differs from this program's"
            )
    return [str(key) for key in moments]


def _reader(state: StepProgram, reader: StateReader, key: str, place: Place) -> Callable[[str], torch.Tensor]:
    """A function that reads the value or moment (`key`) of a parameter for a place, and checks its dtype and shape; half
    precision, in which earlier versions kept masters and moments, is widened."""
    dtype = place.dtype

    def value(part: str) -> torch.Tensor:
        expected = state.outline.tensor(part)
        loaded = reader.read(f"{key}/{part}", expected.shape)
        if dtype == torch.float32 and loaded.dtype in HALVES:
            loaded = loaded.float()
        if loaded.dtype != dtype or loaded.shape != expected.shape:
            raise BundleError(
                f"the checkpoint holds {part!r} as {loaded.dtype}{list(loaded.shape)}, "
                f"this program as {dtype}{list(expected.shape)}: it was saved from another program"
            )
        return loaded

    return value
