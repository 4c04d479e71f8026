"""Does what a program's step rules say: masks that are computed again from the weights that training has come to, gates that are
drawn for each step and driven to a share of closed ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import isfinite
from typing import Any, ClassVar

import torch

from bmgraph.errors import BundleError, InputError
from bmgraph.ir.step_rules import GateTarget, MaskSchedule
from bmgraph.passes.prune.patterns import lowest_of_all, lowest_share, parse_pattern, sparsity_mask
from bmgraph.runtime.training.checkpoint_sections import Found, Section, Take
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram
from bmgraph.training.update_phase import UpdatePhase
from bmgraph.utils.hard_concrete import MOST, logistic_noise, open_probability


class MaskRunner:
    """Keeps the masks of a schedule up to date.

    Every rank gathers the weights of the masks that are due, one after the other, and computes all of them: they are the same on all.
    """

    def __init__(self, step: StepProgram, update: UpdatePhase, rule: MaskSchedule) -> None:
        self._step, self._update, self._rule = step, update, rule

    def after(self, step: int) -> None:
        """Compute the masks again, where more weights are to be zero after this step."""
        rule = self._rule
        if not rule.is_due(step):
            return
        share, groups = rule.share(step), parse_pattern(rule.pattern)
        masks = self._step.tensors
        scores = ((mask, self._score(mask, weight)) for mask, weight in self._weights())
        if groups is None and rule.scope == "global":
            held = {mask: score.cpu() for mask, score in scores}
            zeros = sum(int((~masks[mask]).sum()) for mask in held)
            if zeros < round(share * sum(score.numel() for score in held.values())):
                self._set(lowest_of_all(held, share).items())
            return
        self._set(
            (
                mask,
                sparsity_mask(score, *_kept(groups, share))
                if groups
                else lowest_share(score, share, rule.scope == "row"),
            )
            for mask, score in scores
        )

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(mask, the weight that it masks), whole, in the order of the tensors that hold them; collective."""
        masks: dict[str, list[str]] = {}
        for mask, weight in self._rule.masks:
            masks.setdefault(weight, []).append(mask)
        for name, place in self._step.places.items():
            if not any(part in masks for part in place.names):
                continue
            trained = name in self._step.updates
            held, tensor = self._update.saved(name) if trained else (place, self._step.tensors[name])
            for part, whole in held.join(tensor, self._step.ranks).items():
                yield from ((mask, whole) for mask in masks.get(part, ()))

    def _score(self, mask: str, weight: torch.Tensor) -> torch.Tensor:
        """Magnitudes f[out, in]."""
        score = weight.detach().abs().to(self._step.device)
        return score.T if mask in self._rule.transposed else score

    def _set(self, masks: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take over masks bool[out, in] that have more zeros than those of before."""
        for name, mask in masks:
            held = self._step.tensors[name]
            new = mask.T if name in self._rule.transposed else mask
            if int((~new).sum()) > int((~held).sum()):
                held.copy_(new)


def _kept(groups: tuple[int, int], share: float) -> tuple[int, int]:
    """How many of each group stay at a share of zeros, at least the pattern's."""
    kept, size = groups
    return max(kept, round(size * (1 - share))), size


LATE = 0.01
"""Where the share of closed gates is past its target by more than this, the first multiplier starts at 0 again."""


class GateRunner:
    """Draws the noise of gates, adds the gradient of their Lagrangian, and lets its multipliers ascend.

    What is added does not depend on the data: every rank adds it to what it holds of the gradients.
    """

    def __init__(self, step: StepProgram, update: UpdatePhase, rule: GateTarget) -> None:
        self._step, self._update, self._rule = step, update, rule
        self.multipliers = [0.0, 0.0]
        trained = {part: name for name in step.trained for part in step.places[name].names}
        self._names = [alpha for _, alpha in rule.gates if alpha in trained]
        self._held_by = dict.fromkeys(trained[name] for name in self._names)

    @contextmanager
    def drawn(self, step: int, seed: int) -> Iterator[None]:
        """Noise on the gates, the same on all ranks and in all micro-batches; none afterwards."""
        mixed = hashlib.sha256(f"gates {seed} {step} {self._rule.gates[0][0]}".encode()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
        held = [self._step.tensors[noise] for noise, _ in self._rule.gates]
        try:
            for tensor in held:
                tensor.copy_(logistic_noise(tensor.shape, generator))
            yield
        finally:
            for tensor in held:
                tensor.zero_()

    def add(self, means: Mapping[str, torch.Tensor], step: int) -> None:
        """Add the gradient of l1 (s - t) + l2 (s - t)^2 to mean gradients in place; collective."""
        if not self._names:
            return
        gates = self._bounded()
        opened = open_probability(torch.cat(list(gates.values())))
        gap = 1 - float(opened.mean()) - self._rule.share(step)
        first, second = self.multipliers
        if first * gap < 0 and abs(gap) > LATE:
            first = 0.0  # it pushes past the target
        slope = -(first + 2 * second * gap) * opened * (1 - opened) / len(opened)
        slopes = dict(zip(gates, torch.split(slope, [len(item) for item in gates.values()])))
        for name in self._held_by:
            state = self._step.updates[name].state
            for part, own, span in _held(state, means[name], self._step.ranks.rank):
                if part in slopes:
                    own += slopes[part][span].to(own)
        self.multipliers = [first + self._rule.rate * gap, second + self._rule.rate * gap**2]

    def _bounded(self) -> dict[str, torch.Tensor]:
        """log alpha by name, from -MOST to MOST: a gate far out would have no gradient to come back by; collective."""
        gates = self._log_alpha()
        if all(float(item.abs().amax()) <= MOST for item in gates.values()):  # the same on all ranks
            return gates
        for name in self._held_by:
            place, tensor = self._update.saved(name)
            for part, own, _ in _held(place, tensor, self._step.ranks.rank):
                if part in gates:
                    own.clamp_(-MOST, MOST)
            self._update.renew(name)
        return {name: item.clamp(-MOST, MOST) for name, item in gates.items()}

    def closed(self) -> float:
        """The expected share of closed gates; collective."""
        return 1 - float(open_probability(torch.cat(list(self._log_alpha().values()))).mean())

    def _log_alpha(self) -> dict[str, torch.Tensor]:
        """log alpha of all gates by name, whole, f64: a sum over ranks of what each holds."""
        program, ranks = self._step.outline, self._step.ranks
        sizes = [program.tensor(name).numel() for name in self._names]
        flat = torch.zeros(sum(sizes), dtype=torch.float64)
        found = dict(zip(self._names, torch.split(flat, sizes)))
        split = False
        for name in self._held_by:
            place, tensor = self._update.saved(name)
            split |= place.split
            if place.split or ranks.rank == 0:
                for part, own, span in _held(place, tensor, ranks.rank):
                    if part in found:
                        found[part][span] = own.detach().to(found[part])
        if ranks.size > 1:
            flat = ranks.sum(flat.to(self._step.device)).cpu()
        return dict(zip(self._names, torch.split(flat, sizes)))


def _held(place: Place, tensor: torch.Tensor, rank: int) -> Iterator[tuple[str, torch.Tensor, slice]]:
    """(parameter, view of what a rank holds of it, flat, and which of its elements these are)."""
    if not place.packed:
        yield place.pieces[0].name, tensor.view(-1), slice(None)
        return
    begin = rank * place.share if place.split else 0
    for piece in place.pieces:
        first, last = max(begin, piece.offset), min(begin + tensor.numel(), piece.offset + piece.size)
        if first < last:
            span = slice(first - piece.offset, last - piece.offset)
            yield piece.name, tensor[first - begin : last - begin], span


class StepRules(Section):
    """All that the rules of a step's program do, and in a checkpoint the multipliers of its gates."""

    name: ClassVar[str] = "gates"

    def __init__(self, step: StepProgram, update: UpdatePhase, in_backward: bool) -> None:
        rules = step.outline.step_rules
        self._masks = [MaskRunner(step, update, rule) for rule in rules if isinstance(rule, MaskSchedule)]
        self.gates = [GateRunner(step, update, rule) for rule in rules if isinstance(rule, GateTarget)]
        if self.gates and in_backward:
            raise InputError(
                "the program has gates, whose gradients get a term of their own: leave optimizer_in_backward out"
            )

    @contextmanager
    def drawn(self, step: int, seed: int) -> Iterator[None]:
        """What is random for one step, of which `step` were made before."""
        with ExitStack() as stack:
            for item in self.gates:
                stack.enter_context(item.drawn(step, seed))
            yield

    def add(self, means: Mapping[str, torch.Tensor], step: int) -> None:
        """Add to mean gradients, in place, what no loss knows; collective."""
        for item in self.gates:
            item.add(means, step)

    def after(self, step: int) -> None:
        """Called after each step, with the number of steps that were made; collective."""
        for item in self._masks:
            item.after(step)

    def saved(self) -> dict[str, Any]:
        """The multipliers of each target."""
        return {"multipliers": [item.multipliers for item in self.gates]}

    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        """Take over the multipliers."""
        held = found[0].get("multipliers", list) if found else [[0.0, 0.0]] * len(self.gates)
        valid = len(held) == len(self.gates) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(item) is float and isfinite(item) for item in pair)
            for pair in held
        )
        if not valid:
            raise BundleError(
                f"the checkpoint holds multipliers={str(held)[:100]} for {len(self.gates)} targets of gates: it was altered"
            )

        def take() -> None:
            for item, pair in zip(self.gates, held):
                item.multipliers = list(pair)

        return take
