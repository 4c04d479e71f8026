"""Checkpoints of training: what was trained, whole and by name, so that any number of ranks resumes them.

Rank 0 writes one file, tensor by tensor as they are gathered; every rank reads from it what it holds. Frozen parameters
are not in it: the digest of each is, and a trainer that holds others is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import Bundle, read_bundle, write_bundle
from bmgraph.serialize.safetensors_io import open_tensors, stream_tensors
from bmgraph.training.step_program import StepProgram

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

STATE = "state.safetensors"
VALUE = "value"
"""The name in the file of what a tensor holds, beside those of what the optimizer remembers of it."""


def save_trainer(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint; raises BundleError on all ranks where rank 0 cannot, and then leaves nothing."""
    state = trainer.state
    manifest = {
        "steps": trainer.steps,
        "seed": trainer.seed,
        "optimizer": type(trainer.optimizer).__name__,
        "moments": _moments(trainer),
        "frozen": {name: item.hex() for name, item in state.digests.items() if name in _frozen(state)},
    }
    tensors = _gathered(trainer)
    with state.ranks.on_rank0() as first:
        try:
            if first:
                write_bundle(
                    path, "trainer", manifest,
                    {STATE: lambda file: stream_tensors(file, _entries(trainer), tensors)},
                )  # fmt: skip
        finally:
            for _ in tensors:
                pass  # the other ranks gather too, and so does the first where it could not write


def load_trainer(trainer: Trainer, path: Path) -> None:
    """Let a trainer go on from a checkpoint; raises BundleError on all ranks, and changes nothing, where it does not fit."""
    state = trainer.state
    values: dict[str, dict[str, torch.Tensor]] = {}
    with state.ranks.fail_together():
        bundle = read_bundle(path)
        moments = _check(trainer, bundle)
        with open_tensors(bundle.file(STATE)) as read:
            for name in _stored(state):
                keys = (VALUE, *moments) if name in state.trained else (VALUE,)
                values[name] = {key: state.share(name, _reader(state, read, key)) for key in keys}
    for name, held in values.items():
        tensor = state.tensors[name]
        tensor.copy_(held.pop(VALUE))
        if name in state.trained:
            trainer.rule.state[tensor] = trainer.optimizer.torch_state(bundle.manifest["steps"], held)
    trainer.steps, trainer.seed = bundle.manifest["steps"], bundle.manifest["seed"]


def _moments(trainer: Trainer) -> list[str]:
    """What the optimizer remembers by now of every number that it trains."""
    first = trainer.rule.state.get(trainer.state.tensors[trainer.state.trained[0]], {})
    return [key for key in trainer.optimizer.moments if isinstance(first.get(key), torch.Tensor)]


def _stored(state: StepProgram) -> tuple[str, ...]:
    """The tensors that training changes: those that have a gradient, and buffers."""
    return (*state.trained, *(name for name in state.tensors if name in state.outline.buffers))


def _frozen(state: StepProgram) -> set[str]:
    stored = {part for name in _stored(state) for part in state.parameters_of(name)}
    return set(state.outline.parameters) - stored


def _entries(trainer: Trainer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of all that `_gathered` gives, in its order."""
    state, entries = trainer.state, {}
    for name in _stored(state):
        for key in (VALUE, *(_moments(trainer) if name in state.trained else ())):
            for part in state.parameters_of(name):
                tensor = state.outline.tensor(part)
                entries[f"{key}/{part}"] = tensor.dtype, tuple(tensor.shape)
    return entries


def _gathered(trainer: Trainer) -> Iterator[torch.Tensor]:
    """What is stored, whole, one bucket at a time; every rank takes all of it."""
    state = trainer.state
    for name in _stored(state):
        tensor = state.tensors[name]
        yield from state.whole(name, tensor).values()
        for key in _moments(trainer) if name in state.trained else ():
            yield from state.whole(name, trainer.rule.state[tensor][key]).values()


def _check(trainer: Trainer, bundle: Bundle) -> list[str]:
    """The moments that a checkpoint holds; raises BundleError unless it is of this program and optimizer."""
    state, manifest = trainer.state, bundle.manifest
    if bundle.kind != "trainer":
        raise BundleError(f"{bundle.path} is a saved {bundle.kind}, not a checkpoint of training")
    moments, frozen = manifest.get("moments"), manifest.get("frozen")
    numbers = all(type(manifest.get(key)) is int for key in ("steps", "seed"))
    if not (numbers and isinstance(moments, list) and isinstance(frozen, dict)):
        raise BundleError(f"the manifest of {bundle.path} describes no checkpoint")
    kind = type(trainer.optimizer).__name__
    if manifest.get("optimizer") != kind or not set(moments) <= set(trainer.optimizer.moments):
        raise BundleError(
            f"{bundle.path} was saved with {manifest.get('optimizer')}, this trainer has {kind}: give the same optimizer"
        )
    mine = {name: item.hex() for name, item in state.digests.items() if name in _frozen(state)}
    for name in sorted({*mine, *frozen}):
        if mine.get(name) != frozen.get(name):
            raise BundleError(
                f"{bundle.path} was trained on another program: its frozen parameter {name!r} is not this one's"
            )
    return [str(key) for key in moments]


def _reader(
    state: StepProgram, read: Callable[[str], torch.Tensor], key: str
) -> Callable[[str], torch.Tensor]:
    """Reads a part's value or moment from the file, held against the program."""

    def value(part: str) -> torch.Tensor:
        found: Any = read(f"{key}/{part}")
        wanted = state.outline.tensor(part)
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            raise BundleError(
                f"the checkpoint holds {part!r} as {found.dtype}{list(found.shape)}, "
                f"this program as {wanted.dtype}{list(wanted.shape)}: it is of another program"
            )
        return found  # type: ignore[no-any-return]

    return value
