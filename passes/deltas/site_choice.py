"""Chooses the linears that get a delta: by name, role and layer, without those that are excluded."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.roles import parts_by_role
from bmgraph.analysis.structure.sites import Part, Structure
from bmgraph.analysis.weight_sites import other_products
from bmgraph.errors import InputError, PassError
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context

ALL_LINEAR = "all-linear"
"""The target that is every linear of the repeated layers (of a model without layers: every linear), as PEFT calls it."""


@dataclass(frozen=True)
class SiteChoice:
    """Which linears get a delta: those that `targets` name or whose role is in `roles`, in `layers`, and not in `exclude`.

    Without both, those with one of the roles in `default`, of which a model need not have all.
    """

    targets: tuple[str, ...]
    roles: tuple[str, ...]
    exclude: tuple[str, ...]
    layers: tuple[int | str, ...]
    default: tuple[str, ...]

    def of(self, program: Program, structure: Structure, context: Context) -> dict[Part, str]:
        """The chosen outputs of linears with the role that they were chosen by ("" by name); declines what takes no delta.

        Raises PassError for a pattern or a layer that is not in the program.
        """
        names = _names(program, structure)
        kept = self._kept(structure, names)
        if self.targets:
            return _by_name(program, structure, self.targets, names, kept, context)
        roles = self.roles
        if not roles:
            known = _roles(program, structure)
            roles = tuple(role for role in self.default if any(fnmatchcase(name, role) for name in known))
            if not roles:
                raise PassError(
                    f"the default choice, {' and '.join(self.default)}, fits no role of the model, which has "
                    f"{', '.join(sorted(known)) or 'none'}: choose linears by targets, such as targets='all-linear'"
                )
        return _by_role(program, structure, roles, kept, context)

    def _kept(self, structure: Structure, names: Mapping[str, list[str]]) -> frozenset[str]:
        """The sites that are not excluded, and are in one of the layers."""
        exclude = resolve_patterns(
            self.exclude, [name for known in names.values() for name in known], "exclude"
        )
        kept = {site for site, known in names.items() if not any(matches(name, exclude) for name in known)}
        return frozenset(kept & in_layers(structure, self.layers) if self.layers else kept)


def check_layers(layers: Sequence[int | str]) -> None:
    """Raise InputError for what is neither the number of a layer nor a range of them."""
    for item in layers:
        if isinstance(item, str):
            _range(item)


def _range(text: str) -> slice:
    """The range of layers that a text says as Python's slices do, such as "2:6" or "-4:"."""
    ends = text.split(":")
    try:
        first, last = (int(end) if end.strip() else None for end in ends)
    except ValueError:
        raise InputError(
            f"layers={text!r} is no range: give numbers of layers, or ranges such as '2:6' and '-4:'"
        ) from None
    return slice(first, last)


def in_layers(structure: Structure, layers: Sequence[int | str]) -> set[str]:
    """The sites of layers, which are counted from 0 in each stack (an encoder's, a decoder's)."""
    found: set[str] = set()
    most = max((len(stack.layers) for stack in structure.stacks), default=0)
    for item in layers:
        part = _range(item) if isinstance(item, str) else slice(item, item + 1 if item != -1 else None)
        chosen = [layer for stack in structure.stacks for layer in stack.layers[part]]
        if not chosen:
            raise PassError(
                f"layers={item!r}: the program has {most} layers, counted from 0"
                if most
                else f"layers={item!r}: the program has no repeated layers; choose by targets or roles alone"
            )
        found.update(site for layer in chosen for site in layer.sites)
    return found


def _names(program: Program, structure: Structure) -> dict[str, list[str]]:
    """Every weight of a product or table -> its names, tied ones too."""
    names = {item.name: [item.name] for item in structure.linears}
    names |= {name: [name] for name in unsupported(program, structure)}
    for alias, name in program.ties.items():
        names.get(name, []).append(alias)
    return names


def _by_name(
    program: Program,
    structure: Structure,
    targets: Sequence[str],
    names: Mapping[str, list[str]],
    kept: frozenset[str],
    context: Context,
) -> dict[Part, str]:
    """The linears whose name, or one of its tied names, fits a pattern."""
    reasons = unsupported(program, structure)
    everywhere = ALL_LINEAR in targets
    if everywhere:
        kept -= frozenset(reasons)
        layered = {site for layer in structure.layers for site in layer.sites} & kept
    patterns = resolve_patterns(
        [target for target in targets if target != ALL_LINEAR],
        [name for known in names.values() for name in known],
        "targets",
    )
    linears = {item.name: item for item in structure.linears}
    chosen: dict[Part, str] = {}
    for site, known in names.items():
        meant = everywhere and (site in layered if layered else True)
        if site not in kept or not (meant or any(matches(name, patterns) for name in known)):
            continue
        if site in reasons:
            context.declined(site, reasons[site])
        else:
            chosen[Part(site, ((0, linears[site].out_features),))] = ""
    return chosen


def _by_role(
    program: Program, structure: Structure, roles: Sequence[str], kept: frozenset[str], context: Context
) -> dict[Part, str]:
    """The outputs whose role matches a glob; a linear that is chosen whole is not chosen again in part."""
    parts, reasons, known = (
        parts_by_role(structure),
        unsupported(program, structure),
        _roles(program, structure),
    )
    for pattern in roles:
        if not any(fnmatchcase(role, pattern) for role in known):
            near = difflib.get_close_matches(pattern, sorted(known), 2, 0.3) or sorted(parts)
            raise PassError(f"roles={pattern!r} fits no role; near it: {', '.join(near)}")
    chosen = {
        part: role
        for role, found in parts.items()
        if any(fnmatchcase(role, pattern) for pattern in roles)
        for part in found
        if part.linear not in reasons and part.linear in kept
    }
    for name, reason in reasons.items():
        if name in kept and any(fnmatchcase(structure.role(name), pattern) for pattern in roles):
            context.declined(name, reason)
    whole = {part.linear for part in chosen if part.size == structure.linear(part.linear).out_features}
    return {
        part: role
        for part, role in chosen.items()
        if part.linear not in whole or part.size == structure.linear(part.linear).out_features
    }


def _roles(program: Program, structure: Structure) -> set[str]:
    """The roles of a program's products and tables."""
    return {*parts_by_role(structure), *map(structure.role, unsupported(program, structure))}


def unsupported(program: Program, structure: Structure) -> dict[str, str]:
    """Name of a weight that cannot take a delta -> the reason."""
    nodes = {(graph, node.name): node for graph in program.graphs for node in program.graphs[graph].nodes}
    found = {
        item.name: "it is a router whose scores only select experts: no gradient would reach its delta"
        for item in structure.linears
        if all(has_role(nodes[use.graph, use.node], NodeRole.ROUTER) for use in item.uses)
    }
    found |= {
        name: "it is a stack of experts: a delta can be attached only to a linear"
        for group in structure.experts
        for name in (group.up, group.gate, group.down)
        if name is not None
    }
    linears = {item.name for item in structure.linears}
    found |= {
        item.name: "it is an embedding, which is looked up, not multiplied: a delta can be attached only to a linear"
        for item in structure.embeddings
        if item.name not in linears
    }
    found |= {
        name: f"{reason}: a delta can be attached only to a linear"
        for name, reason in other_products(program).items()
        if name not in linears and name not in found
    }
    return found
