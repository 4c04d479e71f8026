"""Where the tensors of a checkpoint are: by parameter name, whole, or in pieces of which each rank writes its own.

One rank writes all into `state.safetensors`. Of several, rank r writes `state-0000r-of-0000n.safetensors`: of what is packed
flat, the elements of its share, whether all ranks hold the whole or each its share; of what is not packed, rank 0 writes
all. So no rank gathers or sends anything. The manifest says which elements of a parameter a file has, if not all
(`SPANS`); any number of ranks, at any stage, reads from all files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bmgraph.runtime.training.checkpoint_values import VALUE
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

STATE_FILE = "state.safetensors"
SPANS = "spans"
"""Key in the manifest: by file, then by key of a tensor, its first element in the flat parameter and the one after its last."""


def state_file(rank: int, ranks: int) -> str:
    """The name of the file that a rank writes."""
    return STATE_FILE if ranks == 1 else f"state-{rank + 1:05d}-of-{ranks:05d}.safetensors"


@dataclass(frozen=True)
class Part:
    """What one rank writes of the value or of a moment of one parameter: all of it, or the elements of `span`, flat."""

    key: str
    tensor: torch.Tensor
    span: tuple[int, int] | None = None


def held_moments(trainer: Trainer) -> list[str]:
    """The moments that the optimizer holds now: none before the first step."""
    first = trainer.update.moments[trainer.state.trained[0]]
    return [key for key in trainer.optimizer.moments if key in first]


def places_of(trainer: Trainer, name: str, moments: Sequence[str]) -> dict[str, Place]:
    """Where the value and the moments of a stored tensor live, by key in the file."""
    state = trainer.state
    if name not in state.updates:
        return {VALUE: state.places[name]}
    of_moments = dict.fromkeys(moments, state.updates[name].state)
    return {VALUE: trainer.update.saved(name)[0], **of_moments}


def stored(state: StepProgram) -> tuple[str, ...]:
    """The tensors that training changes: trained ones and buffers."""
    return (*state.trained, *(name for name in state.tensors if name in state.outline.buffers))


def frozen_parameters(state: StepProgram) -> set[str]:
    """The parameters that are not in a checkpoint."""
    kept = {part for name in stored(state) for part in state.places[name].names}
    return set(state.outline.parameters) - kept


def keys_of(trainer: Trainer, moments: Sequence[str]) -> Iterator[str]:
    """The keys of all tensors of a checkpoint."""
    for name in stored(trainer.state):
        for key, place in places_of(trainer, name, moments).items():
            yield from (f"{key}/{part}" for part in place.names)


def held(trainer: Trainer) -> Iterator[tuple[str, Place, torch.Tensor]]:
    """Of every stored tensor the key (`VALUE` or a moment), its place, and what this rank holds."""
    state, update = trainer.state, trainer.update
    for name in stored(state):
        tensors = {VALUE: update.saved(name)[1], **update.moments[name]} if name in state.updates else {}
        for key, place in places_of(trainer, name, held_moments(trainer)).items():
            yield key, place, tensors.get(key, state.tensors[name])


def own_parts(trainer: Trainer) -> list[Part]:
    """What this rank writes, as views of what it trains."""
    ranks, found = trainer.state.ranks, []
    for key, place, tensor in held(trainer):
        if place.packed:
            share = tensor if place.split or ranks.size == 1 else place.chunk(tensor, ranks.rank)
            found += list(_of_share(key, place, share, ranks.rank))
        elif ranks.rank == 0:
            found.append(Part(f"{key}/{place.names[0]}", tensor))
    return found


def _of_share(key: str, place: Place, share: torch.Tensor, rank: int) -> Iterator[Part]:
    """The parts of parameters that lie in a rank's share of their flat tensor."""
    begin = rank * place.share
    for piece in place.pieces:
        first, last = max(begin, piece.offset), min(begin + share.numel(), piece.offset + piece.size)
        elements = share[first - begin : last - begin]
        if last - first == piece.size:
            yield Part(f"{key}/{piece.name}", elements.view(piece.shape))
        elif first < last:
            yield Part(f"{key}/{piece.name}", elements, (first - piece.offset, last - piece.offset))


def spans_of(parts: Sequence[Part]) -> dict[str, list[int]]:
    """The spans of a rank's parts, as the manifest holds them."""
    return {part.key: list(part.span) for part in parts if part.span is not None}
