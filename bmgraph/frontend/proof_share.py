"""Divides the proof of a captured program among ranks, each of which captures the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from bmgraph.distributed.process_group import Ranks, SilentRanks
from bmgraph.ir.program import Program


@dataclass(frozen=True)
class ProofShare:
    """The comparisons with the eager model that one of `size` ranks makes; by default all."""

    rank: int = 0
    size: int = 1

    def has(self, number: int) -> bool:
        """Whether the comparison of outputs with this number is this rank's."""
        return number % self.size == self.rank

    def parameters(self, chosen: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The parameters whose gradients this rank compares: large and small ones on each."""
        if self.size == 1:
            return dict(chosen)
        ordered = sorted(chosen, key=lambda name: (-chosen[name].numel(), name))
        own = set(ordered[self.rank :: self.size])
        return {name: parameter for name, parameter in chosen.items() if name in own}


WHOLE_PROOF = ProofShare()


def captured_by_ranks(ranks: Ranks, capture: Callable[[ProofShare], Program], given: bool = False) -> Program:
    """The program that `capture` makes on each rank, of whose proof each makes its share. Collective.

    Where the verdicts or the programs of ranks differ, all capture again and make the whole proof: what is wrong is then found
    by each, with the reason that it has on one rank. What fails on one rank fails on all. `given`: `capture` returns a program
    that was captured before.
    """
    divides = ranks.size > 1 and not isinstance(ranks, SilentRanks)
    with ranks.fail_together():
        program = capture(ProofShare(ranks.rank, ranks.size) if divides else WHOLE_PROOF)
    if not divides:
        return program
    verdict = "given" if given else f"{program}\n{program.training}"
    if ranks.first_different({"program": hashlib.sha256(verdict.encode()).digest()}) is not None:
        with ranks.fail_together():
            return capture(WHOLE_PROOF)
    if not given:
        told = [
            json.loads(text) for text in ranks.gather_texts(json.dumps([program.backward, *program.unproven]))
        ]
        program.backward = "; ".join(dict.fromkeys(backward for backward, *_ in told if backward))
        program.unproven = tuple(dict.fromkeys(line for _, *unproven in told for line in unproven))
    return program
