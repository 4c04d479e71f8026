"""Figures of single parameters while they train: mean, standard deviation and gradient norm, from the parts that ranks hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from bmgraph.errors import InputError
from bmgraph.training.placement import Piece, Place
from bmgraph.training.step_program import CONSTANT, StepProgram

if TYPE_CHECKING:
    from bmgraph.training.update_phase import UpdatePhase


@dataclass(frozen=True)
class TensorFigures:
    """One parameter. `std` is that of a sample (divided by n - 1), None for one element; `gradient_norm` is the L2 norm of its
    mean gradient in the last step before clipping, None if it does not train or the step came before it was watched."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float | None
    gradient_norm: float | None


@dataclass(frozen=True)
class Inspection:
    """Figures by parameter; prints as a table."""

    step: int
    tensors: tuple[TensorFigures, ...]

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Figures by name."""
        return {
            item.name: {"mean": item.mean, "std": item.std, "gradient_norm": item.gradient_norm}
            for item in self.tensors
        }

    def __str__(self) -> str:
        rows = [("parameter", "shape", "mean", "std", "gradient norm")]
        for item in self.tensors:
            figures = (
                "-" if value is None else f"{value:.4g}"
                for value in (item.mean, item.std, item.gradient_norm)
            )
            rows.append((item.name, "x".join(map(str, item.shape)), *figures))  # type: ignore[arg-type]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [f"after step {self.step}"]
        for row in rows:
            cells = [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])),
            ]
            lines.append("  ".join(cells))
        return "\n".join(lines)


class Inspector:
    """Takes figures of the parameters of one step."""

    def __init__(self, step: StepProgram) -> None:
        self._step = step
        self._watched: set[str] = set()
        self._squares: dict[str, torch.Tensor] = {}
        """By watched parameter: the sum of squares of this rank's part of its last gradient, f64[]."""

    def watch(self, patterns: str | Iterable[str]) -> list[str]:
        """Take gradient norms of the parameters that globs fit, by name or module path, from the next step on; returns them.

        Raises InputError for a glob that fits none.
        """
        names = [name for name in self._step.outline.parameters if self._is_float(name)]
        found: dict[str, None] = {}
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            fitting = [
                name
                for name in names
                if any(fnmatchcase(text, pattern) for text in (name, name.rpartition(".")[0]))
            ]
            if not fitting:
                near = get_close_matches(pattern.strip("*."), names, 1, 0.0)
                raise InputError(f"inspect: {pattern!r} fits no parameter; near it: {', '.join(near)}")
            found |= dict.fromkeys(fitting)
        self._watched |= found.keys()
        return list(found)

    def see(self, means: Mapping[str, torch.Tensor]) -> None:
        """Take the norms of some of a step's mean gradients, as they lie with the optimizer's state; not collective."""
        if not self._watched:
            return
        self._squares |= {
            piece.name: part.double().square().sum()
            for name, mean in means.items()
            if self._watched.intersection(self._step.updates[name].state.names)
            for piece, part in _parts(self._step.updates[name].state, mean, self._step.ranks.rank)
            if piece.name in self._watched
        }

    def take(self, patterns: str | Iterable[str], update: UpdatePhase, step: int) -> Inspection:
        """The figures of the parameters that globs fit; collective."""
        names = self.watch(patterns)
        held = self._held(set(names), update)
        split = {name for name, (place, _) in held.items() if place.split}
        sizes = {name: math.prod(self._step.outline.parameters[name].shape) for name in names}
        sums = self._over_ranks(names, {name: part.sum() for name, (_, part) in held.items()}, split)
        means = {name: total / max(sizes[name], 1) for name, total in zip(names, sums)}
        errors = {name: (part - means[name]).square().sum() for name, (_, part) in held.items()}
        squares = self._over_ranks(names, errors, split)
        trained = {
            part: update_.state for update_ in self._step.updates.values() for part in update_.state.names
        }
        gradients = self._over_ranks(names, self._squares, {name for name in trained if trained[name].split})
        known = self._over_ranks(
            names,
            {name: torch.ones((), dtype=torch.float64, device=self._step.device) for name in self._squares},
            set(trained),
        )
        figures = []
        for name, square, gradient, has in zip(names, squares, gradients, known):
            std = math.sqrt(square / (sizes[name] - 1)) if sizes[name] > 1 else None
            shape = tuple(self._step.outline.parameters[name].shape)
            figures.append(TensorFigures(name, shape, means[name], std, math.sqrt(gradient) if has else None))
        return Inspection(step, tuple(figures))

    def _held(self, names: set[str], update: UpdatePhase) -> dict[str, tuple[Place, torch.Tensor]]:
        """This rank's part of each parameter in float64, flat, with the place of its tensor."""
        found: dict[str, tuple[Place, torch.Tensor]] = {}
        for tensor, place in self._step.places.items():
            if tensor.startswith(CONSTANT) or not names.intersection(place.names):
                continue
            where, value = (
                update.saved(tensor) if tensor in self._step.updates else (place, self._step.tensors[tensor])
            )
            for piece, part in _parts(where, value, self._step.ranks.rank):
                if piece.name in names:
                    found[piece.name] = where, part.double()
        return found

    def _over_ranks(
        self, names: Sequence[str], values: Mapping[str, torch.Tensor], split: set[str]
    ) -> list[float]:
        """Sums over the ranks that hold parts; of what every rank holds whole, that of rank 0."""
        ranks, device = self._step.ranks, self._step.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        mine = [
            values[name].to(device) if name in values and (name in split or ranks.rank == 0) else zero
            for name in names
        ]
        together: list[float] = ranks.sum(torch.stack(mine)).tolist()
        return together

    def _is_float(self, name: str) -> bool:
        return self._step.outline.parameters[name].is_floating_point()


def _parts(place: Place, held: torch.Tensor, rank: int) -> Iterator[tuple[Piece, torch.Tensor]]:
    """What a rank holds of each parameter of a place, flat; those that it holds nothing of are left out."""
    if not place.packed:
        yield place.pieces[0], held.reshape(-1)
        return
    begin = rank * place.share if place.split else 0
    for piece in place.pieces:
        first, last = max(begin, piece.offset), min(begin + held.numel(), piece.offset + piece.size)
        if first < last:
            yield piece, held[first - begin : last - begin]
