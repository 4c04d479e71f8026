"""Computes the keys and values of a soft prompt once, as parameters.

No token of a text changes them, because the prompt comes before all text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.deltas.soft_prompt import prompt_length, prompted_input, without_prompt
from bmgraph.ir.program import Program
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles, find_sequence_roles

PARAMETER_PREFIX = "prompt_"
"""Prefix of the parameters' names; the name of the cached value follows."""

SEQUENCE_AXIS = 2
"""The axis of positions in keys and values [B, heads, positions, size]."""


def prefix_length(prefix: Mapping[str, torch.Tensor]) -> int:
    """The number of positions of a prefix; 0 for an empty one."""
    return next((int(value.shape[SEQUENCE_AXIS]) for value in prefix.values()), 0)


def split_off_prompt(program: Program) -> tuple[Program, SequenceRoles, dict[str, torch.Tensor]]:
    """The program to add a cache to, its sequence roles, and the keys and values in front of the cache.

    A soft prompt in front of the decoder's tokens is removed from the program. A prompt of an encoder stays: it does not
    affect the cache.
    """
    prompted = prompted_input(program)
    if prompted is not None:
        unprompted = without_prompt(program)
        roles = find_sequence_roles(unprompted)
        if roles.tokens.target == prompted:
            return unprompted, roles, _prompt_keys_and_values(program, roles)
    return program, find_sequence_roles(program), {}


def _prompt_keys_and_values(program: Program, roles: SequenceRoles) -> dict[str, torch.Tensor]:
    """Name of a cached value -> keys or values f[1, heads, tokens, size] of the prompt of a program.

    `roles` are those of the program without its prompt.
    """
    tokens, found = prompt_length(program), {}
    names = {node.name: name for node, name in roles.cached.items()}

    def visit(node: str, value: torch.Tensor) -> None:
        found[names[node]] = value[:1].narrow(SEQUENCE_AXIS, 0, tokens).clone()

    if program.device.type == "meta":
        for node, name in roles.cached.items():
            _, heads, _, size = node.meta["val"].shape
            found[name] = torch.empty(1, heads, tokens, size, dtype=node.meta["val"].dtype, device="meta")
        return found
    masks = {str(node.target) for node in roles.masks}
    batch = {
        name: torch.ones_like(value) if name in masks else value for name, value in program.example.items()
    }
    Observed(program).run(batch, set(names), visit)
    return found
