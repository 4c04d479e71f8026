"""Computes the keys and values of a soft prompt or a prefix once, as parameters; tables of them where rows choose.

No token of a text changes them, because the prompt comes before all text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from bmgraph.analysis.interpreter import Observed
from bmgraph.analysis.token_values import SEQUENCE_AXIS
from bmgraph.deltas import prefix as prefixes
from bmgraph.deltas import row_prompts as prompts
from bmgraph.deltas.prefix import RowChoice, prefixed_inputs, row_choice, without_prefix
from bmgraph.deltas.row_prompts import has_row_prompts, without_row_prompts
from bmgraph.deltas.soft_prompt import prompt_length, prompted_input, without_prompt
from bmgraph.errors import PassError
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, placeholders
from bmgraph.passes.kvcache.sequence_roles import SequenceRoles, find_sequence_roles

PARAMETER_PREFIX = "prompt_"
"""Prefix of the parameters' names; the name of the cached value follows."""


@dataclass(frozen=True)
class Front:
    """The keys and values in front of a cache, by the name of the cached value: f[1, heads, n, size].

    Where rows choose, by the input `choice`, they are tables f[deltas + 1, heads, n, size], of which each delta uses the last positions,
    those with a one in `used` f[deltas + 1, n]. `roles` are those of what reads them, and `used_role` of what reads `used`; `paths` are
    the modules of the attentions.
    """

    values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    choice: str = ""
    used: torch.Tensor | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    used_role: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """The number of positions; 0 without any."""
        return next((int(value.shape[SEQUENCE_AXIS]) for value in self.values.values()), 0)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """By the names of the parameters that hold them."""
        found = {PARAMETER_PREFIX + name: value for name, value in self.values.items()}
        return found if self.used is None else {**found, USED: self.used}


USED = f"{PARAMETER_PREFIX}used"
"""The name of the parameter that says which positions a delta uses."""


def split_off_prompt(program: Program) -> tuple[Program, SequenceRoles, Front]:
    """The program to add a cache to, its sequence roles, and the keys and values in front of the cache.

    A soft prompt in front of the decoder's tokens, or a prefix of its attentions, is removed from the program; so are those that
    rows choose. Those of an encoder stay: they do not affect the cache. Raises PassError for a prefix of some of the decoder's
    attentions.
    """
    for source in prefixed_inputs(program):
        bare, values = without_prefix(program, source)
        chosen = row_choice(program, source)
        if chosen is not None:
            _restore_choice(program, bare, chosen.choice)
        roles = find_sequence_roles(bare)
        if roles.tokens.target == source:
            return bare, roles, _prefix_of(roles, values, chosen)
    prompted = prompted_input(program)
    if prompted is not None:
        unprompted = without_prompt(program)
        roles = find_sequence_roles(unprompted)
        if roles.tokens.target == prompted:
            return unprompted, roles, Front(_prompt_keys_and_values(program, roles))
    if has_row_prompts(program.graph):
        unprompted, used, choice, prompted = without_row_prompts(program)
        _restore_choice(program, unprompted, choice)
        roles = find_sequence_roles(unprompted)
        if roles.tokens.target == prompted:
            return unprompted, roles, _keys_and_values_of_rows(program, roles, used, choice)
    return program, find_sequence_roles(program), Front()


def _restore_choice(program: Program, bare: Program, choice: str) -> None:
    """Give a program that lost it with its prompts the input that rows choose by again."""
    if any(spec.name == choice for spec in bare.inputs):
        return
    spec = next(spec for spec in program.inputs if spec.name == choice)
    rows = next(iter(placeholders(bare.graph).values())).meta["val"].shape[0]
    with bare.edit() as editor:
        editor.input(choice, program.example[choice], (rows,), spec.names, InputKind.CHOICE)
    bare.ignored = tuple(name for name in bare.ignored if name != choice)


def _prefix_of(roles: SequenceRoles, values: Mapping[str, torch.Tensor], chosen: RowChoice | None) -> Front:
    """The prefix by the names of cached values; `values` are by the name of the node, `chosen` is as `row_choice` gives it."""
    missing = [node for node in roles.cached if node.name not in values]
    if missing:
        raise PassError(
            f"in {missing[0].meta.get('scope') or missing[0].name} attention has no prefix, and that of others does: a KV cache needs one in "
            "front of all keys and values, or of none"
        )
    found = {name: values[node.name] for node, name in roles.cached.items()}
    if chosen is None:
        return Front(found)
    _check_mask(roles)
    kinds = {name: prefixes.VALUES if name.startswith("value") else prefixes.KEYS for name in found}
    return Front(
        found, chosen.choice, chosen.used, kinds, prefixes.USED,
        {name: chosen.paths[node.name] for node, name in roles.cached.items()},
    )  # fmt: skip


def _check_mask(roles: SequenceRoles) -> None:
    """Raise PassError where nothing could hide the positions that a row does not use."""
    if not roles.masks:
        raise PassError(
            "rows choose prompts of different lengths, and the decoder takes no mask that could hide the rest: capture the model with "
            "its attention mask"
        )


def _prompt_keys_and_values(program: Program, roles: SequenceRoles) -> dict[str, torch.Tensor]:
    """Name of a cached value -> keys or values f[1, heads, tokens, size] of the prompt of a program.

    `roles` are those of the program without its prompt.
    """
    return _observed(program, roles, prompt_length(program), {})


def _keys_and_values_of_rows(program: Program, roles: SequenceRoles, used: fx.Node, choice: str) -> Front:
    """Tables of the keys and values of the prompts that rows choose, at the last positions of each entry."""
    _check_mask(roles)
    marks = program.tensor(str(used.target))
    deltas, room = len(marks) - 1, int(marks.shape[1])
    counts = marks.sum(1).long().tolist() if marks.device.type != "meta" else [0] * (deltas + 1)
    found: dict[str, torch.Tensor] = {}
    for node, name in roles.cached.items():
        _, heads, _, size = node.meta["val"].shape
        sizes = (deltas + 1, int(heads), room, int(size))
        found[name] = torch.zeros(sizes, dtype=node.meta["val"].dtype, device=program.device)
    last = torch.zeros_like(marks)
    for number, count in enumerate(counts):
        if not count:
            continue
        for name, value in _observed(program, roles, count, {choice: number}).items():
            found[name][number, :, room - count :] = value[0]
        last[number, room - count :] = 1
    return Front(found, choice, last, dict.fromkeys(found, prompts.COMPUTED), prompts.KEPT)


def _observed(
    program: Program, roles: SequenceRoles, tokens: int, chosen: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Name of a cached value -> its first positions f[1, heads, tokens, size], for rows that all choose one number."""
    found: dict[str, torch.Tensor] = {}
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
    batch |= {name: torch.full_like(batch[name], number) for name, number in chosen.items()}
    Observed(program).run(batch, set(names), visit)
    return found
