"""The keys and values of a soft prompt: no token of a text changes them, so they are computed once, as parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.deltas.soft_prompt import prompt_length, prompted_input, without_prompt
from bmgraph.ir.program import Program
from bmgraph.passes.kvcache.sequence_roles import Sides, find_sides

PREFIX = "prompt_"
"""Begins the names of the parameters; the name of the cached value follows."""

SEQUENCE = 2
"""The axis of positions in keys and values [B, heads, positions, size]."""


def length_of(prefix: Mapping[str, torch.Tensor]) -> int:
    """The number of positions of a prefix; 0 for an empty one."""
    return next((int(value.shape[SEQUENCE]) for value in prefix.values()), 0)


def take_prefix(program: Program) -> tuple[Program, Sides, dict[str, torch.Tensor]]:
    """The program that a cache is added to, its sides, and what stands in front of the cache: a program whose tokens have
    a soft prompt in front goes on without it. A prompt of an encoder stays: it has nothing to do with the cache."""
    source = prompted_input(program)
    if source is not None:
        bare = without_prompt(program)
        sides = find_sides(bare)
        if sides.tokens.target == source:
            return bare, sides, prefix_of(program, sides)
    return program, find_sides(program), {}


def prefix_of(program: Program, sides: Sides) -> dict[str, torch.Tensor]:
    """The keys and values [1, heads, tokens, size] of the prompt in front of the tokens of a program, by the name under
    which the cache keeps what follows them; `sides` are those of the program without its prompt."""
    tokens, found = prompt_length(program), {}
    names = {node.name: name for node, name in sides.cached.items()}

    def visit(node: str, value: torch.Tensor) -> None:
        found[names[node]] = value[:1].narrow(SEQUENCE, 0, tokens).clone()

    if program.device.type == "meta":
        for node, name in sides.cached.items():
            _, heads, _, size = node.meta["val"].shape
            found[name] = torch.empty(1, heads, tokens, size, dtype=node.meta["val"].dtype, device="meta")
        return found
    masks = {str(node.target) for node in sides.masks}
    batch = {
        name: torch.ones_like(value) if name in masks else value for name, value in program.example.items()
    }
    Observed(program).run(batch, set(names), visit)
    return found
