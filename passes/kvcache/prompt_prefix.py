"""Computes the keys and values of a soft prompt or a prefix once, as parameters.

No token of a text changes them, because the prompt comes before all text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.token_values import SEQUENCE_AXIS
from bmgraph.deltas.prefix import prefixed_inputs, without_prefix
from bmgraph.deltas.soft_prompt import prompt_length, prompted_input, without_prompt
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles, find_sequence_roles

PARAMETER_PREFIX = "prompt_"
"""Prefix of the parameters' names; the name of the cached value follows."""


def prefix_length(prefix: Mapping[str, torch.Tensor]) -> int:
    """The number of positions of a prefix; 0 for an empty one."""
    return next((int(value.shape[SEQUENCE_AXIS]) for value in prefix.values()), 0)


def split_off_prompt(program: Program) -> tuple[Program, SequenceRoles, dict[str, torch.Tensor]]:
    """The program to add a cache to, its sequence roles, and the keys and values in front of the cache.

    A soft prompt in front of the decoder's tokens, or a prefix of its attentions, is removed from the program. Those of an encoder
    stay: they do not affect the cache. Raises PassError for a prefix of some of the decoder's attentions.
    """
    for source in prefixed_inputs(program):
        bare, values = without_prefix(program, source)
        roles = find_sequence_roles(bare)
        if roles.tokens.target == source:
            return bare, roles, _prefix_of(roles, values)
    prompted = prompted_input(program)
    if prompted is not None:
        unprompted = without_prompt(program)
        roles = find_sequence_roles(unprompted)
        if roles.tokens.target == prompted:
            return unprompted, roles, _prompt_keys_and_values(program, roles)
    return program, find_sequence_roles(program), {}


def _prefix_of(roles: SequenceRoles, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name of a cached value -> its prefix; `values` are by the name of the node."""
    missing = [node for node in roles.cached if node.name not in values]
    if missing:
        raise PassError(
            f"in {missing[0].meta.get('scope') or missing[0].name} attention has no prefix, and that of others does: a KV cache needs one in "
            "front of all keys and values, or of none"
        )
    return {name: values[node.name] for node, name in roles.cached.items()}


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
