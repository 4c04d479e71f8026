"""Proof: what a pass compares to prove its rewrite by other means than the rewrite itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.verify.reference_outputs import Reference, exact_bounds
from bmgraph.verify.weight_only_check import unrounded

SEED = 0
"""Seed of the random numbers that proofs put in place of parameters."""


@dataclass(frozen=True)
class Proof:
    """Given to `Pass.prove`: the batches to compare on, with the outputs of the program before the pass."""

    reference: Reference

    def same(self, expected: Program, found: Program, what: str, slack: float = 1.0) -> None:
        """Raise VerificationError, which begins with `what`, where two programs differ by more than `slack` roundings.

        Rounding of activations is removed from both. They are run on the same batches, of which each reads its inputs.
        """
        expected = unrounded(expected)
        bounds = {name: slack * bound for name, bound in exact_bounds(expected).items()}
        wanted = replace(self.reference, outputs=self.reference.rerun(expected).outputs)
        moved = wanted.beyond(wanted.rerun(unrounded(found)), bounds)
        if moved:
            raise VerificationError(f"{what}: {moved}")

    def with_input(self, name: str, value: int) -> Proof:
        """The same proof with an integer input, one number a row, set to one value."""
        batches = [
            {**batch, name: torch.full_like(batch[name], value)} if name in batch else batch
            for batch in self.reference.batches
        ]
        return Proof(replace(self.reference, batches=batches))


def random_like(tensor: torch.Tensor, size: float, salt: int) -> torch.Tensor:
    """Normal random numbers of the shape, dtype and device of a tensor, with a root mean square of `size`."""
    generator = torch.Generator().manual_seed(SEED + salt)
    return (size * torch.randn(tensor.shape, generator=generator)).to(tensor)
