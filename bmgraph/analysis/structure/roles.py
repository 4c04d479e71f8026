"""Lists the outputs of linears by role, fused linears split into their roles."""

from __future__ import annotations

from bmgraph.analysis.structure.sites import Part, Structure


def parts_by_role(structure: Structure) -> dict[str, tuple[Part, ...]]:
    """Role -> the outputs of linears that have it.

    A fused q/k/v is listed whole under "attention.qkv", and in parts under "attention.q", "attention.k" and
    "attention.v"; likewise a fused gate and up. A linear without another role is under "linear".
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
    """Add the part of a fused linear: one whose own role is a combined one."""
    if part is not None and structure.role(part.linear) != role:
        found.setdefault(role, {})[part] = None
