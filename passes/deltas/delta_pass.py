"""What passes that attach deltas to linears have in common: which sites, what trains whole, how it is proved."""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Linear, Part, Structure
from bmgraph.deltas.backbone import check_backbone_frozen
from bmgraph.deltas.changed_weights import ChangeAt, with_changes
from bmgraph.deltas.family import Change, Delta
from bmgraph.deltas.linear_family import ROWS, LinearFamily, NewDelta, attach_all
from bmgraph.deltas.low_rank import rows_of
from bmgraph.deltas.whole_modules import module_tensors, train_whole
from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.deltas.site_choice import SiteChoice, check_layers
from bmgraph.verify.proof import Proof, random_like

PEFT_NAMES: Mapping[str, str] = MappingProxyType(
    {"target_modules": "targets", "exclude_modules": "exclude", "layers_to_transform": "layers"}
)
"""What PEFT calls the options that all these passes have."""


@dataclass(frozen=True, repr=False)
class DeltaPass(ModelPass):
    """Attach a new delta, which changes nothing, to each chosen linear, and freeze all else.

    targets: globs over module paths, ends of paths ("q_proj"), modules that hold linears ("mlp"), regular expressions over
    whole paths ("re:.*[qv]_proj"), or "all-linear"; or roles: globs over roles ("attention.q", "feedforward.*"). exclude:
    patterns as in targets, of what gets none. layers: numbers of layers, counted from 0 in each stack, or ranges ("2:6",
    "-4:"). modules_to_save: modules, by path, end of path or glob, that train whole beside the deltas and are saved with
    them, such as a fresh head.

    Stacks of experts, and routers whose scores only select experts, are declined. Raises PassError where a pattern or a layer
    is not in the program.
    """

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta"})
    other_names: ClassVar[Mapping[str, str]] = PEFT_NAMES

    family: ClassVar[type[LinearFamily]]
    """The family of the deltas."""
    default_roles: ClassVar[tuple[str, ...]] = ()
    """Roles that get a delta where neither targets nor roles are given."""

    targets: tuple[str, ...] = field(default=(), kw_only=True)
    roles: tuple[str, ...] = field(default=(), kw_only=True)
    exclude: tuple[str, ...] = field(default=(), kw_only=True)
    layers: tuple[int | str, ...] = field(default=(), kw_only=True)
    modules_to_save: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers)
        if self.targets and self.roles:
            raise InputError("give targets or roles, not both")

    @abstractmethod
    def new_change(self, program: Program, linear: Linear, stem: str, source: fx.Node | None) -> Change:
        """A change of a linear that changes nothing yet; `stem`, the prefix of its parameters, seeds random values.

        `source`: the linear whose input it reads, for a family that has one (`LinearFamily.sources`).
        """

    @abstractmethod
    def told(self, change: Change) -> str:
        """A new change in a few words for the report: "rank 8"."""

    def default_sites(self) -> tuple[str, ...]:
        """Roles that get a delta where neither targets nor roles are given; a model need not have all of them."""
        return self.default_roles

    def shared_tensors(self, program: Program, chosen: Sequence[Linear]) -> Mapping[str, torch.Tensor]:
        """The tensors that the deltas on the chosen linears have together, by key."""
        return {}

    def options(self) -> Mapping[str, Any]:
        """What all deltas of the pass have, and does not change their outputs in evaluation."""
        return {}

    def why_not(self, program: Program, structure: Structure, linear: Linear) -> str:
        """Why a linear cannot take a delta of the family; empty where it can."""
        return ""

    def check_numbers(self, program: Program, delta: Delta) -> None:
        """Raise VerificationError where the numbers or options of a new delta are not those of this pass."""
        if dict(delta.options) != dict(self.options()):
            raise VerificationError(
                f"{delta.site}: its delta has {dict(delta.options)}, not {dict(self.options())}"
            )

    def check_names(self, names: Sequence[str]) -> None:
        """Raise PassError where an option names a site that is not among those of the program."""
        return

    def biases(self, program: Program, structure: Structure, chosen: Sequence[Linear]) -> list[str]:
        """The biases of the model that train whole beside deltas on the chosen linears."""
        return []

    def chosen(self, program: Program, structure: Structure, context: Context) -> dict[Part, str]:
        """The outputs of linears that get a delta, with the role that they were chosen by ("" by name)."""
        choice = SiteChoice(self.targets, self.roles, self.exclude, self.layers, self.default_sites())
        return choice.of(program, structure, context)

    def run(self, program: Program, context: Context) -> Program:
        """Add a delta to every use of the chosen linears."""
        let_train(program, module_tensors(program, self.modules_to_save, "modules_to_save"), context)
        structure, family = find(program), self.family()
        self.check_names([linear.name for linear in structure.linears])
        sources = family.sources(program)
        parts = self._accepted(program, structure, sources, context)
        linears = [structure.linear(part.linear) for part in parts]
        names = family.shared_names(program)
        together = self.shared_tensors(program, linears) if parts else {}
        added: list[tuple[Linear, NewDelta]] = []
        taken: set[str] = set()
        for linear, (part, role) in zip(linears, parts.items()):
            on_part = part.size != linear.out_features
            stem = family.free_stem(program, linear.name, role.rpartition(".")[2] if on_part else "", taken)
            taken.add(stem)
            new = self.new_change(program, linear, stem, sources.get(linear.uses[0].node))
            rows = {ROWS: rows_of(part.runs, linear.out_features)} if on_part else {}
            change = Change({**together, **new.tensors, **rows}, new.numbers)
            added.append((linear, NewDelta(family, linear.name, stem, change, self.options(), names)))
            context.edited(linear.name, f"{self.told(change)} on {role or 'all outputs'}")
        let_train(program, self.biases(program, structure, linears), context, together=True)
        attach_all(program, added, by=str(self))
        return program

    def _accepted(
        self, program: Program, structure: Structure, sources: Mapping[str, fx.Node], context: Context
    ) -> dict[Part, str]:
        """The chosen outputs whose linears can take a delta; declines the others."""
        family, parts = self.family(), self.chosen(program, structure, context)
        found: dict[Part, str] = {}
        for part, role in (joined(parts) if family.exclusive else parts).items():
            linear = structure.linear(part.linear)
            reason = self.why_not(program, structure, linear)
            if family.reads_elsewhere and any(use.node not in sources for use in linear.uses):
                reason = "it does not end an attention or a feed-forward, whose input its delta would read"
            if linear.name in program.trained_whole:
                reason = "it trains whole (modules_to_save)"
            if reason:
                context.declined(linear.name, reason)
            else:
                found[part] = role
        return found

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """With random values, each delta must change its linear as its family says, by other means: fresh ones hide faults."""
        family, found, new, changes = self.family(), after.clone(), [], []
        for delta in family.recognise(after.graph):
            names = _tensors_of(delta)
            if delta.bound or not names or any(name in before.parameters for name in names):
                continue
            self.check_numbers(after, delta)
            new.append(delta)
            for salt, name in enumerate(names):
                if name not in found.frozen and found.parameters[name] is after.parameters[name]:
                    found.parameters[name] = _random(after.parameters[name], salt)
        for delta in new:
            values = {key: evaluate(found, node) for key, node in delta.tensors.items()}
            change = Change(values, delta.numbers)
            changes.append(ChangeAt(delta.linear.name, family, change, delta.options))
        check_backbone_frozen(after)
        what = f"with random values a delta is not what the family {self.family.name!r} computes"
        proof.same(with_changes(before, changes), found, what, slack=10)


def let_train(program: Program, names: Sequence[str], context: Context, together: bool = False) -> None:
    """Let tensors of the model train whole beside deltas, and report it; together: tied ones stay tied."""
    train_whole(program, names, together)
    for name in names:
        context.edited(name, "trains whole")


def joined(parts: Mapping[Part, str]) -> dict[Part, str]:
    """Parts of one linear as one part, with their roles."""
    found: dict[str, list[tuple[Part, str]]] = {}
    for part, role in parts.items():
        found.setdefault(part.linear, []).append((part, role))
    return {
        Part(name, tuple(sorted(run for part, _ in own for run in part.runs))): "+".join(
            role for _, role in own
        )
        for name, own in found.items()
    }


def _tensors_of(delta: Delta) -> list[str]:
    """The parameters that the tensors of a delta are computed from."""
    nodes = (node for expression in delta.tensors.values() for node in upstream(expression))
    return list(dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr"))


def _random(old: torch.Tensor, salt: int) -> torch.Tensor:
    """Random values in the place of a matrix, and beside those of a vector, which may stand for factors near one."""
    if old.dim() < 2:
        return old + random_like(old, 0.3, salt)
    return random_like(old, old.shape[-1] ** -0.5, salt)


def uniform(program: Program, key: str, shape: tuple[int, ...], size: float = 1.0) -> torch.Tensor:
    """Uniform random numbers in ±sqrt(size / inputs), the last of the shape, seeded by a text; none for a program without values."""
    if program.device.type == "meta":
        return torch.empty(shape, device="meta")
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    numbers = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * numbers - 1) / math.sqrt(shape[-1] / size)
