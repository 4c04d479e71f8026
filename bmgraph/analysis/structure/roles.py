"""Which outputs of which linears play a role: a linear that plays several has a part for each."""

from __future__ import annotations

from bmgraph.analysis.structure.sites import Part, Structure


def parts_by_role(structure: Structure) -> dict[str, tuple[Part, ...]]:
    """Role -> the outputs that play it.

    A fused q/k/v stands whole under "attention.qkv", and in parts under "attention.q", "attention.k" and
    "attention.v"; a fused gate and up likewise. What plays no part in a site is under "linear".
    """
    found: dict[str, dict[Part, None]] = {}
    for item in structure.linears:
        found.setdefault(item.role, {})[Part(item.name, ((0, item.out_features),))] = None
    for attention in structure.attentions:
        for letter, part in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            _add(structure, found, f"attention.{letter}", part)
    for dense in structure.feedforwards:
        _add(structure, found, "feedforward.gate", dense.gate)
        _add(structure, found, "feedforward.up", dense.up)
    return {role: tuple(parts) for role, parts in found.items()}


def _add(structure: Structure, found: dict[str, dict[Part, None]], role: str, part: Part | None) -> None:
    """Note the part of a linear whose own role is of several."""
    if part is not None and structure.role(part.linear) != role:
        found.setdefault(role, {})[part] = None
