"""Does what a program's step rules say: masks that are computed again from the weights that training has come to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch

from bmgraph.ir.step_rules import MaskSchedule
from bmgraph.passes.prune.patterns import lowest_of_all, lowest_share, parse_pattern, sparsity_mask
from bmgraph.training.step_program import StepProgram
from bmgraph.training.update_phase import UpdatePhase


class RuleRunner(ABC):
    """Does what one rule says, on all ranks together."""

    @abstractmethod
    def after(self, step: int) -> None:
        """Called after each step, with the number of steps that were made; collective."""


class MaskRunner(RuleRunner):
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


def rules_of(step: StepProgram, update: UpdatePhase) -> list[RuleRunner]:
    """What does the rules of the program of a step."""
    return [
        MaskRunner(step, update, rule) for rule in step.outline.step_rules if isinstance(rule, MaskSchedule)
    ]
