"""Digests of a step's weights, which ranks compare, and checkpoints those of what does not train."""

from __future__ import annotations

from collections.abc import Collection

from bmgraph.ir.program import Program
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.digest import digest, sampled_digest
from bmgraph.utils.stored_tensor import is_too_large


def digests_of(program: Program, but: Collection[str] = ()) -> dict[str, bytes]:
    """sha256 of every parameter and buffer `but` some, by name; of those whose values are to stay in files, of samples of about
    8 KB."""
    return {
        name: bytes.fromhex(digest(sampled_digest(tensor) if is_too_large(tensor) else tensor))
        for name, tensor in program.tensors().items()
        if name not in but
    }


def complete_digests(step: StepProgram) -> None:
    """Put the digests of all bytes in the place of those of samples for what does not train and is in files. Collective:
    each rank reads some of these tensors, a block at a time.

    Raises BundleError, on all ranks, where a file was changed.
    """
    names = [
        name
        for name, tensor in step.tensors.items()
        if is_too_large(tensor) and name in step.digests and name not in step.updates
    ]
    if not names:
        return
    with step.ranks.fail_together():
        own = {name: digest(step.tensors[name]) for name in names[step.ranks.rank :: step.ranks.size]}
    told = (line.split(" ", 1) for text in step.ranks.gather_texts(_lines(own)) for line in text.splitlines())
    step.digests |= {name: bytes.fromhex(found) for found, name in told}


def _lines(digests: dict[str, str]) -> str:
    return "\n".join(f"{found} {name}" for name, found in digests.items())
