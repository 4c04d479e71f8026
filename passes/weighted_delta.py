"""WeightedDelta: attach a weighted sum of saved deltas as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.family import DeltaFamily, Part
from bmgraph.deltas.peft_format import Adapter
from bmgraph.deltas.weighted_sum import Combination
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.adapter_matching import check_backbone, is_backbone_of, load_adapter, with_adapter
from bmgraph.verify.proof import Proof


@dataclass(frozen=True, repr=False)
class WeightedDelta(ModelPass):
    """Attach the weighted sum of saved deltas as one delta: `WeightedDelta({"trec": 0.7, "spam": 0.3})` with
    `resources={"trec": "trec/", "spam": "spam/"}`. Weights may be negative.

    combination: how LoRAs are added up, as in PEFT's `add_weighted_adapter`: "cat" puts their factors side by side (exact; the
    ranks add up), "linear" adds up factors of one rank, times the square roots of weights and scales (an approximation), "svd"
    is the best approximation of the exact sum of rank `rank`, by default the largest of theirs. Scales of IA3 ("linear") and
    biases that BitFit added are added up as they are. The sum trains on, and is saved as one delta.

    Raises what `LoadDelta` raises, InputError for weights that are no numbers, and PassError for deltas of several families, of
    a family without weighted sums, or with modules that train whole.
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"combination_type": "combination", "svd_rank": "rank"}
    )

    weights: tuple[tuple[str, float], ...] = ()
    combination: Combination = "cat"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(self.weights, self.combination, self.rank)

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folders, by the names of the deltas."""
        return tuple(name for name, _ in self.weights)

    def fits(self, program: Program, context: Context) -> bool:
        """Whether all adapters were trained on the program."""
        return is_backbone_of(program, [load_adapter(context, name) for name in self.resources])

    def run(self, program: Program, context: Context) -> Program:
        """Let the family add up its deltas, and put the sum on the program."""
        total = self._total(program, context)
        said = " + ".join(f"{weight:g} {name}" for name, weight in self.weights)
        for part in total.parts:
            for edit in part.family.attach(program, part, by=str(self)):
                context.edited(edit.site, f"{edit.what}: {said}", edit.tensors)
        freeze_backbone(program)
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what changed weights, or the formula of the family, make of the program."""
        check_backbone_frozen(after)
        expected = with_adapter(before, self._total(before, context))
        proof.same(expected, after, "it does not compute the weighted sum", slack=10)

    def _total(self, program: Program, context: Context) -> Adapter:
        """The sum of the adapters, of each family in them."""
        found: dict[DeltaFamily, list[tuple[str, float, Part]]] = {}
        alone: dict[str, str] = {}
        for name, weight in self.weights:
            adapter = load_adapter(context, name)
            check_backbone(program, adapter)
            for part in adapter.parts:
                if part.family.beside and not part.family.contents(part):
                    continue  # the folder holds nothing of a family that is saved beside others
                found.setdefault(part.family, []).append((name, weight, part))
                if not part.family.beside:
                    alone[name] = part.family.name
        if len(set(alone.values())) > 1:
            kinds = ", ".join(f"{name!r} of {family!r}" for name, family in alone.items())
            raise PassError(
                f"weighted sums are of deltas of one family: these are {kinds}; merge one after the other"
            )
        parts = tuple(
            family.combined(program, own, self.combination, self.rank) for family, own in found.items()
        )
        return Adapter(parts[0].path, parts)


def check_weights(weights: tuple[tuple[str, float], ...], combination: Combination, rank: int | None) -> None:
    """Raise InputError for names that are given twice, weights that are not finite or zero, and a rank that is not for "svd"."""
    names = [name for name, _ in weights]
    if not names or len(set(names)) != len(names):
        raise InputError(
            f"weights={weights!r}: give each delta once, as weights={{'one': 0.7, 'other': 0.3}}"
        )
    for name, weight in weights:
        if not math.isfinite(weight) or weight == 0:
            raise InputError(f"the weight of {name!r} is {weight}: give a number other than 0")
    if rank is not None and (combination != "svd" or rank < 1):
        raise InputError(f"rank={rank}: give a rank of at least 1, with combination='svd'")
