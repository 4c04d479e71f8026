"""Checkpoints of a trainer: whole tensors by name, so that any number of ranks can resume from them.

Rank 0 writes one file, tensor by tensor as they are gathered; every rank reads its shards from it. Of frozen parameters
only the digests are saved: a trainer with other frozen parameters is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import BundleError
from bmgraph.runtime.training.checkpoint_fit import (
    COMPUTATION_FILE,
    changed_settings,
    check_computation,
    check_moments,
    check_names,
    new_moments,
    settings_of,
)
from bmgraph.runtime.training.checkpoint_sections import SECTIONS, checked_sections, saved_sections
from bmgraph.runtime.training.checkpoint_values import VALUE, check_values
from bmgraph.serialize.bundle import Bundle, read_bundle, write_bundle
from bmgraph.serialize.safetensors_io import open_tensors, stream_tensors
from bmgraph.training.executor import written_in_place
from bmgraph.training.fp32_form import HALVES
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.versions import versions

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

STATE_FILE = "state.safetensors"
MOST_STEPS = 2**53
"""Up to here a float counts steps, as optimizers of torch do."""


def save_trainer(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; raises BundleError on all ranks if rank 0 cannot, and then leaves nothing behind."""
    state = trainer.state
    manifest = {
        "steps": trainer.steps,
        "seed": trainer.seed,
        "optimizer": type(trainer.optimizer).__name__,
        "moments": _moments(trainer),
        "settings": settings_of(trainer),
        "versions": versions(),
        "frozen": {name: item.hex() for name, item in state.digests.items() if name in _frozen(state)},
        SECTIONS: saved_sections(trainer.sections, state.ranks),
    }
    tensors = _gathered(trainer)
    with state.ranks.on_rank0() as first:
        try:
            if first:
                write_bundle(
                    path, "trainer", manifest,
                    {
                        COMPUTATION_FILE: lambda file: _write_text(file, state.computation),
                        STATE_FILE: lambda file: stream_tensors(file, _entries(trainer), tensors),
                    },
                )  # fmt: skip
        finally:
            for _ in tensors:
                pass  # gathering is collective: the other ranks take part, and so does rank 0 if writing failed


def load_trainer(trainer: Trainer, path: Path) -> None:
    """Resume a trainer from a checkpoint; raises BundleError on all ranks, and changes nothing, if it does not fit."""
    state = trainer.state
    values: dict[str, dict[str, torch.Tensor]] = {}
    with state.ranks.fail_together():  # reading is not collective
        bundle = read_bundle(path)
        moments = _check(trainer, bundle)
        told = check_computation(trainer, bundle)
        with open_tensors(bundle.open(STATE_FILE)) as stored:
            check_names(bundle, stored.names, {f"{key}/{part}" for key, part, _ in _keys(trainer, moments)})
            for name in _stored(state):
                places = _places(trainer, name, moments)
                values[name] = {
                    key: place.take(state.ranks.rank, _reader(state, stored.read, key, place))
                    for key, place in places.items()
                }
        _check_constants(state, {name: loaded[VALUE] for name, loaded in values.items()})
        check_values(trainer, path, values)
        for name in state.trained if not moments else ():
            values[name] |= new_moments(trainer, bundle, name)
        told += changed_settings(trainer, bundle)
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
        warnings.warn(text, stacklevel=3)


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _check_constants(state: StepProgram, loaded: dict[str, torch.Tensor]) -> None:
    """Raise BundleError if a buffer that no step changes (angles of positions, a mask) has other values.

    They may differ by rounding, since another machine may have computed them.
    """
    changing = {*state.writes, *written_in_place(state)}
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


def _moments(trainer: Trainer) -> list[str]:
    """The moments that the optimizer holds now: none before the first step."""
    first = trainer.update.moments[trainer.state.trained[0]]
    return [key for key in trainer.optimizer.moments if key in first]


def _places(trainer: Trainer, name: str, moments: Sequence[str]) -> dict[str, Place]:
    """Where the value and the moments of a stored tensor live, by key in the file."""
    state = trainer.state
    if name not in state.updates:
        return {VALUE: state.places[name]}
    of_moments = dict.fromkeys(moments, state.updates[name].state)
    return {VALUE: trainer.update.saved(name)[0], **of_moments}


def _stored(state: StepProgram) -> tuple[str, ...]:
    """The tensors that training changes: trained ones and buffers."""
    return (*state.trained, *(name for name in state.tensors if name in state.outline.buffers))


def _frozen(state: StepProgram) -> set[str]:
    """The parameters that are not in a checkpoint."""
    stored = {part for name in _stored(state) for part in state.places[name].names}
    return set(state.outline.parameters) - stored


def _keys(trainer: Trainer, moments: Sequence[str]) -> Iterator[tuple[str, str, Place]]:
    """Of every tensor of the file, in order: the key (`VALUE` or a moment), the parameter and its place."""
    for name in _stored(trainer.state):
        for key, place in _places(trainer, name, moments).items():
            for part in place.names:
                yield key, part, place


def _entries(trainer: Trainer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape by file key of every tensor that `_gathered` yields, in the same order."""
    outline = trainer.state.outline
    return {
        f"{key}/{part}": (place.dtype, tuple(outline.tensor(part).shape))
        for key, part, place in _keys(trainer, _moments(trainer))
    }


def _gathered(trainer: Trainer) -> Iterator[torch.Tensor]:
    """The saved tensors, whole, one bucket at a time; collective, so every rank exhausts it."""
    state, update = trainer.state, trainer.update
    for name in _stored(state):
        held = {VALUE: update.saved(name)[1], **update.moments[name]} if name in state.updates else {}
        for key, place in _places(trainer, name, _moments(trainer)).items():
            yield from place.join(held.get(key, state.tensors[name]), state.ranks).values()


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
    mine = {name: item.hex() for name, item in state.digests.items() if name in _frozen(state)}
    for name in sorted({*mine, *frozen}):
        if mine.get(name) != frozen.get(name):
            raise BundleError(
                f"{bundle.path} was trained on another program: frozen parameter {name!r} differs from this program's"
            )
    return [str(key) for key in moments]


def _reader(
    state: StepProgram, read: Callable[[str], torch.Tensor], key: str, place: Place
) -> Callable[[str], torch.Tensor]:
    """A function that reads the value or moment (`key`) of a parameter for a place, and checks its dtype and shape; half
    precision, in which earlier versions kept masters and moments, is widened."""
    dtype = place.dtype

    def value(part: str) -> torch.Tensor:
        loaded: Any = read(f"{key}/{part}")
        if dtype == torch.float32 and loaded.dtype in HALVES:
            loaded = loaded.float()
        expected = state.outline.tensor(part)
        if loaded.dtype != dtype or loaded.shape != expected.shape:
            raise BundleError(
                f"the checkpoint holds {part!r} as {loaded.dtype}{list(loaded.shape)}, "
                f"this program as {dtype}{list(expected.shape)}: it was saved from another program"
            )
        return loaded  # type: ignore[no-any-return]

    return value
