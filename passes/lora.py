"""LoRA: train a low-rank update next to frozen linears."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import ClassVar

import torch

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.site_filter import matches, resolve_patterns
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.roles import parts_by_role
from bmgraph.analysis.structure.sites import Linear, Part, Structure
from bmgraph.analysis.weight_sites import other_products
from bmgraph.deltas.backbone import check_backbone_frozen
from bmgraph.deltas.changed_weights import with_changed_weights
from bmgraph.deltas.family import Change
from bmgraph.deltas.linear_family import NewDelta, attach_all
from bmgraph.deltas.low_rank import LowRank, rows_of
from bmgraph.deltas.whole_modules import module_tensors, train_whole
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.verify.proof import Proof, random_like

ROLES = ("attention.q", "attention.v")
"""Roles that get a delta where neither targets nor roles are given: the choice that the paper found best."""


@dataclass(frozen=True, repr=False)
class LoRA(ModelPass):
    """Add `alpha / r * B A x` to the output of linears, and freeze all parameters but A [r, in] and B [out, r].

    targets: globs over module paths, ends of paths ("q_proj") or modules that hold linears ("mlp"); or roles: globs over roles ("attention.q", "feedforward.*"); the default is
    attention queries and values. Where a role is a range of a fused linear's outputs, the delta changes that range
    alone. dropout: probability, applied to the input of A in training. seed: A is uniform in ±1/sqrt(in), drawn
    separately for each site; B is zero, so a new delta changes nothing. modules_to_save: modules, by path, end of path
    or glob, that train whole beside the deltas and are saved with them, such as a fresh head.

    The weight may be any expression (int8 codes, masked, stored [in, out]): the delta is attached to the use, not to the
    weight. A second run adds further deltas, which train together with the first. Stacks of experts, and
    routers whose scores only select experts, are declined.

    Raises PassError where a glob matches nothing. Source: Hu et al. 2021 (arXiv:2106.09685).

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import LoRA
        >>> program = bg.capture(torch.nn.Linear(6, 4), (torch.randn(3, 6),))
        >>> tuned = bg.Pipeline([LoRA(r=2, targets=("*",))]).run(program)
        >>> sorted(set(tuned.parameters) - tuned.frozen)
        ['weight_lora_a', 'weight_lora_b']
    """

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"lora_alpha": "alpha", "target_modules": "targets", "lora_dropout": "dropout", "rank": "r"}
    )

    r: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    dropout: float = 0.0
    seed: int = 0
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise InputError(f"r={self.r}: give a rank of at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise InputError(f"alpha={self.alpha}: give a number above 0")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: give a probability of at least 0 and below 1")
        if self.targets and self.roles:
            raise InputError("give targets or roles, not both")

    def run(self, program: Program, context: Context) -> Program:
        """Add a delta to every use of the chosen linears."""
        whole = module_tensors(program, self.modules_to_save, "modules_to_save")
        train_whole(program, whole)
        for name in whole:
            context.edited(name, "trains whole")
        structure = find(program)
        if self.targets:
            chosen = _by_name(program, structure, self.targets, context)
        else:
            chosen = _by_role(program, structure, self.roles or ROLES, context)
        added: list[tuple[Linear, NewDelta]] = []
        for part, role in chosen.items():
            linear = structure.linear(part.linear)
            if linear.name in program.trained_whole:
                context.declined(linear.name, "it trains whole (modules_to_save)")
                continue
            taken = {delta.stem for _, delta in added}
            added.append((linear, self._delta(program, linear, part, role, taken)))
            context.edited(linear.name, f"rank {self.r} on {role or 'all outputs'}")
        attach_all(program, added, by=str(self))
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With random factors, the linears must multiply by W + alpha / r * B A: B is zero, and hides what is wrong."""
        found, family = after.clone(), LowRank()
        changes: list[tuple[str, LowRank, Change]] = []
        for delta in family.recognise(after.graph):
            factors = () if delta.bound else (delta.tensors["a"], *upstream(delta.tensors["b"]))
            names = [str(node.target) for node in factors if node.op == "get_attr"]
            if not names or names[0] in before.parameters:
                continue
            if delta.options["dropout"] != self.dropout:
                raise VerificationError(
                    f"{delta.site}: its delta has dropout {delta.options['dropout']}, not {self.dropout}"
                )
            for salt, name in enumerate(names):
                old = after.parameters[name]
                if old.is_floating_point():
                    found.parameters[name] = random_like(old, old.shape[1] ** -0.5, salt)
            factors_now = {key: evaluate(found, node) for key, node in delta.tensors.items()}
            changes.append((delta.linear.name, family, Change(factors_now, {"scale": self.alpha / self.r})))
        check_backbone_frozen(after)
        expected = with_changed_weights(before, changes)
        proof.same(expected, found, "with random factors a delta is not alpha / r * B A x", slack=10)

    def _delta(self, program: Program, linear: Linear, part: Part, role: str, taken: set[str]) -> NewDelta:
        whole = part.size == linear.out_features
        family = LowRank()
        stem = family.free_stem(program, linear.name, "" if whole else role.rpartition(".")[2], taken)
        a = torch.empty(self.r, linear.in_features, device="meta")
        if program.device.type != "meta":
            a = (2 * _uniform(f"{self.seed} {stem}", a.shape) - 1) / math.sqrt(linear.in_features)
        tensors = {"a": a, "b": torch.zeros(linear.out_features, self.r)}
        if not whole:
            tensors["rows"] = rows_of(part.runs, linear.out_features)
        change = Change(tensors, {"scale": self.alpha / self.r})
        return NewDelta(family, linear.name, stem, change, {"dropout": self.dropout})


def _uniform(key: str, shape: torch.Size) -> torch.Tensor:
    """Uniform random numbers in [0, 1), seeded by a string."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_name(
    program: Program, structure: Structure, targets: Sequence[str], context: Context
) -> dict[Part, str]:
    """The linears whose name, or one of its tied names, matches a glob."""
    known: dict[str, list[str]] = {item.name: [item.name] for item in structure.linears}
    unsupported = _unsupported(program, structure)
    known |= {name: [name] for name in unsupported}
    for alias, name in program.ties.items():
        known.get(name, []).append(alias)
    targets = resolve_patterns(targets, [name for names in known.values() for name in names], "targets")
    linears = {item.name: item for item in structure.linears}
    chosen: dict[Part, str] = {}
    for site, names in known.items():
        if not any(matches(name, targets) for name in names):
            continue
        if site in unsupported:
            context.declined(site, unsupported[site])
        else:
            chosen[Part(site, ((0, linears[site].out_features),))] = ""
    return chosen


def _by_role(
    program: Program, structure: Structure, roles: Sequence[str], context: Context
) -> dict[Part, str]:
    """The outputs whose role matches a glob; a linear that is chosen whole is not chosen again in part."""
    parts, unsupported = parts_by_role(structure), _unsupported(program, structure)
    known = {*parts, *map(structure.role, unsupported)}
    for pattern in roles:
        if not any(fnmatchcase(role, pattern) for role in known):
            near = difflib.get_close_matches(pattern, sorted(known), 2, 0.3) or sorted(parts)
            raise PassError(f"roles={pattern!r} fits no role; near it: {', '.join(near)}")
    chosen = {
        part: role
        for role, found in parts.items()
        if any(fnmatchcase(role, pattern) for pattern in roles)
        for part in found
        if part.linear not in unsupported
    }
    for name, reason in unsupported.items():
        if any(fnmatchcase(structure.role(name), pattern) for pattern in roles):
            context.declined(name, reason)
    whole = {part.linear for part in chosen if part.size == structure.linear(part.linear).out_features}
    return {
        part: role
        for part, role in chosen.items()
        if part.linear not in whole or part.size == structure.linear(part.linear).out_features
    }


def _unsupported(program: Program, structure: Structure) -> dict[str, str]:
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
