"""Proof: what a pass compares to prove its rewrite by other means than the rewrite itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.verify.metrics import relative_error, without_padding
from bmgraph.verify.reference_outputs import Batch, Reference, exact_bounds, fitted
from bmgraph.verify.weight_only_check import unrounded

SEED = 0
"""Seed of the random numbers that proofs put in place of parameters."""


@dataclass(frozen=True)
class Proof:
    """Given to `ModelPass.prove`: the batches to compare on, with the outputs of the program before the pass."""

    reference: Reference

    def fitting(self, program: Program) -> Proof:
        """The proof on those batches alone that a program can run, whose texts may have to be shorter."""
        kept = []
        for index, batch in enumerate(self.reference.batches):
            try:
                with checked_indices(program.device):
                    program(**fitted(batch, program.inputs))
            except (InputError, IndexError, RuntimeError):
                continue
            kept.append(index)
        if not kept:
            raise VerificationError(
                "it runs on none of the batches: give a shorter example, or calibration data"
            )
        outputs = [self.reference.outputs[index] for index in kept]
        batches = [self.reference.batches[index] for index in kept]
        measured = sum(index < self.reference.measured for index in kept)
        return Proof(replace(self.reference, batches=batches, outputs=outputs, measured=measured))

    def same(
        self,
        expected: Program,
        found: Program,
        what: str,
        slack: float = 1.0,
        choose: Mapping[str, int] | None = None,
    ) -> None:
        """Raise VerificationError, which begins with `what`, where two programs differ by more than `slack` roundings.

        Rounding of activations is removed from both. They run on the same batches, of which each reads its inputs;
        `choose` gives inputs of `found`, one number a row, their value.
        """
        expected, found = unrounded(expected), unrounded(found)
        wanted = self.reference.rerun(expected)
        self._check_finite(wanted, what)
        moved = wanted.beyond(self._choosing(found, choose or {}).rerun(found), _bounds(expected, slack))
        if moved:
            raise VerificationError(f"{what}: {moved}")

    def same_values(
        self,
        expected: Program,
        found: Program,
        given: Callable[[Batch], Batch],
        kept: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
        what: str,
        slack: float = 1.0,
    ) -> None:
        """As `same`, but `expected` gets other inputs, made from each batch by `given`, and `kept` of its outputs count.

        Batches that become too long for it are left out.
        """
        expected, found = unrounded(expected), unrounded(found)
        batches, wanted = [], []
        for batch in self.reference.batches:
            try:
                with checked_indices(expected.device):
                    wanted.append(kept(expected(**fitted(given(batch), expected.inputs))))
            except (InputError, IndexError, RuntimeError):
                continue
            batches.append(batch)
        reference = replace(self.reference, batches=batches, outputs=wanted)
        reference.check_compared(what)
        moved = reference.beyond(reference.rerun(found), _bounds(expected, slack))
        if moved:
            raise VerificationError(f"{what}: {moved}")

    def same_rows(self, program: Program, name: str, count: int, what: str, slack: float = 1.0) -> None:
        """Raise VerificationError where a row of mixed values of an input (0 to `count` - 1, one number a row) is not what it
        is where all rows have its value."""
        program = unrounded(program)
        bounds = _bounds(program, slack)
        alone = [self._choosing(program, {name: number}).rerun(program) for number in range(count)]
        rows_axis = next(spec.shape[0] for spec in program.inputs if spec.name == name)
        for index, batch in enumerate(alone[0].batches):
            mixed = torch.arange(len(batch[name]), device=batch[name].device) % count
            outputs = program(**fitted({**batch, name: mixed.to(batch[name].dtype)}, program.inputs))
            for spec in program.outputs:
                if not spec.shape or spec.shape[0] != rows_axis:
                    continue
                wanted = torch.stack([run.outputs[index][spec.name] for run in alone])
                chosen = wanted[mixed, torch.arange(len(mixed), device=mixed.device)]
                error = relative_error(outputs[spec.name], chosen)
                if not error <= bounds[spec.name]:
                    raise VerificationError(f"{what}: {spec.name} moved by {error:.1e} (relative)")

    def _check_finite(self, wanted: Reference, what: str) -> None:
        """Raise VerificationError where an expected value is not finite, and what the program gave there before is.

        Two programs that overflow alike agree in nothing that was computed before.
        """
        for batch, old, new in zip(wanted.batches, self.reference.outputs, wanted.outputs):
            mask = batch[wanted.mask] if wanted.mask else None
            for name, theirs in new.items():
                if not theirs.is_floating_point() or name not in old or old[name].shape != theirs.shape:
                    continue
                mine, theirs = without_padding(name, old[name], theirs, mask, wanted.padded)
                count = int((mine.isfinite() & ~theirs.isfinite()).sum())
                if count:
                    raise VerificationError(
                        f"{what}: this cannot be compared, since {count} of {theirs.numel()} values of {name}, all finite "
                        f"before the pass, overflow {str(theirs.dtype).removeprefix('torch.')} in what is expected: make what "
                        "the pass adds smaller (a smaller alpha, smaller factors), or run it on a program of a wider type"
                    )
        wanted.check_compared(what)

    def _choosing(self, program: Program, values: Mapping[str, int]) -> Reference:
        """The reference with inputs, one number a row, set to one value; the program says how many rows there are."""
        specs = {spec.name: spec for spec in program.inputs}
        batches: list[Batch] = []
        for batch in self.reference.batches:
            sizes = {
                dim: size
                for name, value in batch.items()
                if name in specs
                for dim, size in zip(specs[name].shape, value.shape)
            }
            added = {
                name: torch.full(
                    (sizes[specs[name].shape[0]],), value, dtype=specs[name].dtype, device=program.device
                )
                for name, value in values.items()
            }
            batches.append({**batch, **added})
        return replace(self.reference, batches=batches)


def _bounds(program: Program, slack: float) -> dict[str, float]:
    return {name: slack * bound for name, bound in exact_bounds(program).items()}


def random_like(tensor: torch.Tensor, size: float, salt: int) -> torch.Tensor:
    """Normal random numbers of the shape, dtype and device of a tensor, with a root mean square of `size`."""
    generator = torch.Generator().manual_seed(SEED + salt)
    return (size * torch.randn(tensor.shape, generator=generator)).to(tensor)
