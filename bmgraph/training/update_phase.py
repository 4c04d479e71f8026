"""The update phase of a step: gradients become means where the optimizer's state lives, and new values go back to the graph.

For each trained tensor, by its places (`Update`, `StepProgram.places`):

1. the summed gradient is cut to this rank's chunk if the state is split, moved to the state's device and dtype, and divided
   by the number of items: the mean;
2. the norm of all means is taken, each element once, and they are scaled if it is too large;
3. the optimizer's rule moves the **master**, which is the value itself (or this rank's chunk of it) where value and state
   have one dtype and device, and else a copy that is kept with the state;
4. the value is brought up to date: cast and copied from the master, gathered if it is whole and the state is split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.training.file_tensor import zeros_at
from bmgraph.training.optimizers import Moments, Optimizer
from bmgraph.training.parameter_groups import NO_GROUPS, Groups, ParameterGroups
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram

CHUNK = 2**20
"""Elements of a gradient that are squared in float64 together."""


class UpdatePhase:
    """Updates the trained tensors of a step in place, and holds their optimizer state."""

    def __init__(self, step: StepProgram, groups: Groups = NO_GROUPS) -> None:
        """`groups`: the parameters that are not decayed, or have a learning rate of their own."""
        self._step = step
        self._groups = ParameterGroups(step, groups)
        self.moments: dict[str, Moments] = {name: {} for name in step.updates}
        """The optimizer's moments by trained tensor, in the places of the states; none before the first update."""
        self.count = 0
        """The number of updates that the moments have seen."""
        self._copies: dict[str, torch.Tensor] = {}
        self._masters: dict[str, torch.Tensor] = {}
        for name, update in step.updates.items():
            value, own = step.tensors[name], self._chunk(name)
            if (value.dtype, value.device) != (update.state.dtype, update.state.device):
                master = step.masters.pop(name, own)  # taken: its memory is free where it is copied elsewhere
                self._copies[name] = self._in_place(update.state, master)
            self._masters[name] = self._copies.get(name, own)

    def begin(self, rule: Optimizer) -> None:
        """Make the moments of states that lie in files; the rule makes those in memory when it needs them."""
        for name, update in self._step.updates.items():
            if update.state.folder and rule.kept_moments:
                master = self._masters[name]
                self.moments[name] = {key: zeros_at(update.state, master) for key in rule.moments}

    def _in_place(self, state: Place, value: torch.Tensor) -> torch.Tensor:
        """A value in the place of a state."""
        if not state.folder:
            return value.to(state.device, state.dtype)
        return zeros_at(state, value).copy_(value)

    def saved(self, name: str) -> tuple[Place, torch.Tensor]:
        """The most precise value of a trained tensor, with its place: its master if that is a copy."""
        if name in self._copies:
            return self._step.updates[name].state, self._copies[name]
        return self._step.places[name], self._step.tensors[name]

    def resume(self, name: str, saved: torch.Tensor, moments: Moments) -> None:
        """Take over a value, as `saved` gives it, and moments. Collective if a copy is split and its value whole."""
        self.saved(name)[1].copy_(saved)
        self.renew(name)
        state = self._step.updates[name].state
        self.moments[name] = {key: self._in_place(state, moment) for key, moment in moments.items()}

    def means(self, sums: dict[str, torch.Tensor], count: float) -> dict[str, torch.Tensor]:
        """The gradients where the state lives, divided by the number of items; takes them out of `sums`.

        The sums of packed tensors become the means in place; others are new tensors, since two parameters may share one
        gradient.
        """
        return {name: self.mean(name, sums.pop(name), count) for name in list(sums)}

    def mean(self, name: str, total: torch.Tensor, count: float) -> torch.Tensor:
        """The mean of one summed gradient, as in `means`."""
        gradient = self._at_state(name, total)
        return gradient.div_(count) if self._step.updates[name].gradient.packed else gradient / count

    def norm(self, means: Mapping[str, torch.Tensor]) -> float:
        """The L2 norm of all gradients, the same on all ranks; collective if a state is split."""
        split: list[torch.Tensor] = []
        whole: list[torch.Tensor] = []
        for name, mean in means.items():
            state = self._step.updates[name].state
            (split if state.split else whole).append(_square_sum(mean).to(self._step.device))
        total = torch.stack(whole).sum() if whole else None
        if split:
            over_ranks = self._step.ranks.sum(torch.stack(split).sum())
            total = over_ranks if total is None else total + over_ranks
        assert total is not None
        return float(total.sqrt())

    def clip(self, means: Mapping[str, torch.Tensor], most: float) -> float:
        """Scale the means in place so that their norm is at most `most`; returns it as it was."""
        norm = self.norm(means)
        if norm > most:
            for mean in means.values():
                mean.mul_(most / norm)
        return norm

    def run(self, rule: Optimizer, means: Mapping[str, torch.Tensor], rate: float) -> None:
        """One update of all trained tensors. Where values are gathered it is collective, and what fails on one rank is
        raised on all."""
        if not any(self._is_gathered(name) for name in means):
            self._apply(rule, means, rate)
            return
        with self._step.ranks.fail_together():
            try:
                self._apply(rule, means, rate)
            finally:  # the others gather too
                for name in means:
                    self.renew(name)

    def move(self, rule: Optimizer, means: Mapping[str, torch.Tensor], rate: float) -> None:
        """The rule on some tensors, as a part of the next update: `run` with those that are left completes it.

        No value may be whole where its state is split (`is_gathered`).
        """
        with torch.no_grad():
            masters = {name: self._masters[name] for name in means}
            self._groups.apply(rule, masters, means, self.moments, rate, self.count + 1)
        for name in means:
            if not self._is_gathered(name):
                self.renew(name)

    @property
    def is_gathered(self) -> bool:
        """Whether some value is whole on all ranks, of which each updates a chunk."""
        return any(self._is_gathered(name) for name in self._step.updates)

    def _apply(self, rule: Optimizer, means: Mapping[str, torch.Tensor], rate: float) -> None:
        self.move(rule, means, rate)
        self.count += 1

    def _chunk(self, name: str) -> torch.Tensor:
        """The part of a value that this rank updates, as a view."""
        place, value = self._step.places[name], self._step.tensors[name]
        whole = self._step.updates[name].state.split and not place.split
        return place.chunk(value, self._step.ranks.rank) if whole else value

    def _at_state(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """The part of a gradient that this rank updates with, in the dtype and on the device of the state."""
        update = self._step.updates[name]
        if update.state.split and not update.gradient.split:
            gradient = update.gradient.chunk(gradient, self._step.ranks.rank)
        return gradient.to(update.state.device, update.state.dtype)

    def _is_gathered(self, name: str) -> bool:
        """Whether a value is whole on all ranks, of which each updates a chunk."""
        return self._step.updates[name].state.split and not self._step.places[name].split

    def renew(self, name: str) -> None:
        """Bring a value up to date with its master, where what `saved` gives was changed; collective if it is gathered."""
        own = self._chunk(name)
        if name in self._copies:
            own.copy_(self._copies[name])
        if self._is_gathered(name):
            self._step.tensors[name].copy_(self._step.ranks.gather(own))


def _square_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of squares, f64[], without a copy of the whole tensor in float64."""
    flat = tensor.reshape(-1)
    sums = [
        flat[first : first + CHUNK].double().square_().sum()
        for first in range(0, max(flat.numel(), 1), CHUNK)
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
