"""Parameter groups: which parameters an optimizer does not decay, which have a learning rate of their own, and the rule applied to
each group.

Parameters of several groups may lie in one flat tensor, of which a rank may have a part: a rule then runs on the runs of elements
that belong to one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import MappingProxyType

import torch
from torch import fx

from bmgraph.analysis.structure.linears import module_path, tensors_of
from bmgraph.analysis.structure.norms import find_embeddings, find_norms
from bmgraph.analysis.structure.value_origins import walk
from bmgraph.errors import InputError
from bmgraph.ir.node_role import NodeRole, has_role, is_delta
from bmgraph.ir.program import Program
from bmgraph.ir.step_rules import GateTarget
from bmgraph.ops.traits import argument, place_of
from bmgraph.training.optimizers import Moments, Optimizer
from bmgraph.training.placement import Place
from bmgraph.training.step_program import StepProgram


@dataclass(frozen=True)
class Group:
    """How parameters are updated: with or without weight decay, and at which factor of the learning rate."""

    decays: bool = True
    factor: float = 1.0


PLAIN = Group()
"""The group of parameters of which nothing else is said."""

Groups = Mapping[str, Group]
"""Parameter -> its group; those that are not named are in `PLAIN`."""

NO_GROUPS: Groups = MappingProxyType({})

Run = tuple[int, int, Group]
"""First element and number of elements of a flat tensor, and the group of its parameters."""


def groups_of(step: StepProgram, rule: Optimizer) -> Groups:
    """The groups of the trained parameters of a step: what the optimizer exempts from decay, and the factors of learning rates that
    passes gave them (`Program.lr_factors`). Gates do not decay either.

    Raises InputError as `exempt_parameters` does.
    """
    gates = {name for item in step.outline.step_rules if isinstance(item, GateTarget) for name in item.read}
    exempt, factors = exempt_parameters(step, rule) | gates, step.outline.lr_factors
    named = sorted(step.trained_parameters & {*exempt, *factors})
    return {name: Group(name not in exempt, factors.get(name, 1.0)) for name in named}


def exempt_parameters(step: StepProgram, rule: Optimizer) -> frozenset[str]:
    """The trained parameters that an optimizer does not decay, as its `exempt` says.

    Raises InputError for a pattern that fits no trained parameter.
    """
    exempt = rule.exempt
    if exempt is False or rule.without_decay() == rule:
        return frozenset()
    trained = step.trained_parameters
    if exempt is True:
        return _by_role(step.outline) & trained
    found: set[str] = set()
    for pattern in exempt:
        fitting = {name for name in trained if _fits(name, pattern)}
        if not fitting:
            near = get_close_matches(pattern.strip("*."), sorted(trained), 1, 0.0)
            raise InputError(f"no_decay={pattern!r} fits no trained parameter; near it: {', '.join(near)}")
        found |= fitting
    return frozenset(found)


def _fits(name: str, pattern: str) -> bool:
    """Whether a glob fits a parameter's name or the path of its module."""
    return fnmatchcase(name, pattern) or fnmatchcase(module_path(name), pattern)


def _by_role(program: Program) -> frozenset[str]:
    """The parameters of norms, biases, steps of codes and embedding tables (also a table that the head shares), found in the dataflow."""
    flows = {name: walk(graph) for name, graph in program.graphs.items()}
    found = {norm.name for norm in find_norms(program, flows)}
    found |= {embedding.name for embedding in find_embeddings(program, flows)}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and has_role(node, NodeRole.STEP):
                found.add(str(node.target))
            bias = argument(node, "bias") if _takes_bias(node) else None
            if isinstance(bias, fx.Node):
                found |= set(tensors_of(bias))
    return frozenset(found & set(program.parameters))


def _takes_bias(node: fx.Node) -> bool:
    return node.op == "call_function" and not is_delta(node) and place_of(node.target, "bias") is not None


@dataclass(frozen=True)
class ParameterGroups:
    """Applies a rule to the trained tensors of a step, as the groups of their parameters say."""

    step: StepProgram
    groups: Groups = field(default_factory=dict)

    def apply(
        self,
        rule: Optimizer,
        values: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        moments: Mapping[str, Moments],
        rate: float,
        updates: int,
    ) -> None:
        """One update in place, as `Optimizer.update`, of what this rank has of tensors by name, as they lie in the place of
        their state."""
        for group in dict.fromkeys((PLAIN, *self.groups.values())):
            own = rule if group.decays else rule.without_decay()
            chosen = list(self._chosen(values, gradients, moments, group))
            if not chosen:
                continue
            held = [part for _, _, part, _ in chosen]
            own.update(
                [item[0] for item in chosen], [item[1] for item in chosen], held, rate * group.factor, updates
            )
            for value, _, part, (name, first) in chosen:
                if part is not moments[name]:
                    _put_back(moments[name], values[name], part, first, value.numel())

    def _chosen(
        self,
        values: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        moments: Mapping[str, Moments],
        group: Group,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Moments, tuple[str, int]]]:
        """What of the tensors belongs to a group: value, gradient, moments, and the tensor's name with the first element."""
        for name, value in values.items():
            runs = self._runs(name)
            for first, size, found in runs:
                if found != group:
                    continue
                if len(runs) == 1:
                    yield value, gradients[name], moments[name], (name, 0)
                    continue
                part = {key: whole.narrow(0, first, size) for key, whole in moments[name].items()}
                yield (
                    value.narrow(0, first, size), gradients[name].narrow(0, first, size), part, (name, first),
                )  # fmt: skip

    def _runs(self, name: str) -> Sequence[Run]:
        return runs_of(self.step.updates[name].state, self.step.ranks.rank, self.groups)


def _put_back(moments: Moments, like: torch.Tensor, part: Moments, first: int, size: int) -> None:
    """Keep the moments of a run of elements, where they are new or no views of the whole."""
    for key, moment in part.items():
        if key not in moments:
            moments[key] = torch.zeros_like(like)
        own = moments[key].narrow(0, first, size)
        if not _is_same(own, moment):
            own.copy_(moment)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two views of one size show the same elements; also told of tensors without data."""
    storages = {item.untyped_storage()._cdata for item in (one, other)}
    return len(storages) == 1 and one.storage_offset() == other.storage_offset()


def runs_of(place: Place, rank: int, groups: Groups) -> Sequence[Run]:
    """The runs of elements of one group, of what a rank holds of a place; padding belongs to the last one."""
    own = {name: groups.get(name, PLAIN) for name in place.names}
    if not place.packed or len(set(own.values())) == 1:
        return ((0, 0, own[place.names[0]]),)
    begin = rank * place.share if place.split else 0
    end = begin + place.shape[0]
    runs: list[Run] = []
    for piece in place.pieces:
        first, last = max(begin, piece.offset), min(end, piece.offset + piece.size)
        if first >= last:
            continue
        group = own[piece.name]
        if runs and runs[-1][2] == group:
            runs[-1] = (runs[-1][0], last - begin - runs[-1][0], group)
        else:
            runs.append((first - begin, last - first, group))
    if not runs:  # padding alone
        return ((0, 0, PLAIN),)
    first, _, group = runs[-1]
    return (*runs[:-1], (first, place.shape[0] - first, group))
