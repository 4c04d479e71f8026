"""Freeze: train chosen parameters alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar

from bmgraph.analysis.site_filter import REGEX, fits, nearest
from bmgraph.analysis.structure.finder import find
from bmgraph.deltas.backbone import CHOSEN, backbone_of
from bmgraph.deltas.whole_modules import modules_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.node_role import NodeRole, role_of
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass

DELTAS = "deltas"
"""The exception that is everything which trains of deltas and prompts."""

PARTS_OF_WEIGHTS = frozenset({NodeRole.CODES, NodeRole.SCALE, NodeRole.ZERO_POINT, NodeRole.MASK})
"""Roles of parameters that stand for a weight: they are made from it, and do not train."""


@dataclass(frozen=True, repr=False)
class Freeze(ModelPass):
    """Freeze all parameters but those that are named: `Freeze(except_=("classifier", "*.bias"))`.

    except_: patterns over names of parameters and over the paths of the modules that hold them: globs, ends of paths ("head"),
    or regular expressions over whole ones ("re:layers\\.1[01]\\..*"); "deltas" stands for what trains of deltas and prompts.
    except_roles: globs over roles ("feedforward.*") of linears, whose weights and biases train. What is named trains, also where
    the model had frozen it; a tied parameter is one, by any of its names.

    Passes that add deltas freeze all else, so this one goes behind them. `save_delta` does not hold weights that train by it: use
    `modules_to_save`, or save the whole program. Codes and scales of quantized weights do not train, and are declined.

    Raises InputError where nothing is named, PassError where a pattern or role fits nothing, naming the nearest, or only what
    cannot train.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Freeze
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 2))
        >>> program = bg.Pipeline([Freeze(except_=("1",))]).run(bg.capture(model, (torch.randn(3, 6),)))
        >>> sorted(set(program.parameters) - program.frozen)
        ['1.bias', '1.weight']
    """

    effect: ClassVar[Effect] = "exact"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    provides: ClassVar[frozenset[str]] = frozenset({CHOSEN})
    may_match_nothing: ClassVar[bool] = True

    except_: tuple[str, ...] = ()
    except_roles: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.except_ or self.except_roles):
            raise InputError("nothing would train: name in except_ or except_roles what is not frozen")

    def run(self, program: Program, context: Context) -> Program:
        """Freeze what is not named, and let what is named train."""
        parts = _parts_of_weights(program)
        chosen: set[str] = set()
        for option, pattern, found in self._found(program):
            usable = sorted(found - parts.keys())
            if not usable:
                name = min(found)
                raise PassError(
                    f"{option}={pattern!r} names {name}, {parts[name]}, which cannot be trained: leave that module out of the "
                    "pass that made it, such as Quantize(exclude=...)"
                )
            for name in sorted(found & parts.keys()):
                context.declined(name, f"it is {parts[name]}, which cannot be trained")
            chosen.update(usable)
        frozen = frozenset(program.parameters) - chosen
        for name in sorted(frozen ^ program.frozen):
            context.edited(name, "frozen" if name in frozen else "trains")
        program.frozen = frozen
        return program

    def _found(self, program: Program) -> Iterable[tuple[str, str, set[str]]]:
        """(option, pattern, parameters) of each exception; raises PassError for one without parameters."""
        names = _names(program)
        for pattern in self.except_:
            if pattern == DELTAS:
                found = set(program.parameters) - backbone_of(program).keys() - program.frozen
            else:
                found = {names[path] for path in names if _fits(path, pattern)}
            if not found:
                near = nearest(pattern, _paths(names))
                hint = f"; near it: {', '.join(near)}" if near and pattern != DELTAS else ""
                raise PassError(f"except_={pattern!r} fits no parameter and no module with parameters{hint}")
            yield "except_", pattern, found
        linears = find(program).linears
        roles = {linear.role for linear in linears if linear.role}
        for pattern in self.except_roles:
            found = {
                name
                for linear in linears
                if fnmatchcase(linear.role, pattern)
                for name in linear.tensors
                if name in program.parameters
            }
            if not found:
                near = nearest(pattern, sorted(roles)) or sorted(roles)
                raise PassError(f"except_roles={pattern!r} fits no role; near it: {', '.join(near)}")
            yield "except_roles", pattern, found


def _names(program: Program) -> Mapping[str, str]:
    """Every name of a parameter, tied ones too -> the name that it is kept under."""
    ties = {alias: name for alias, name in program.ties.items() if name in program.parameters}
    return {**{name: name for name in program.parameters}, **ties}


def _paths(names: Iterable[str]) -> list[str]:
    return sorted({path for name in names for path in (name, *modules_of(name))})


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits the name of a parameter or a module that holds it, whole or, for a glob, their end after a dot."""
    for path in (name, *modules_of(name)):
        if fits(path, pattern) or (not pattern.startswith(REGEX) and fnmatchcase(path, f"*.{pattern}")):
            return True
    return False


def _parts_of_weights(program: Program) -> dict[str, str]:
    """The parameters that do not train, because they stand for a weight or hold no floating-point numbers -> what they are."""
    found: dict[str, str] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "get_attr" and role_of(node) in PARTS_OF_WEIGHTS:
                found[str(node.target)] = f"the {role_of(node)} of a weight"
    for name, tensor in program.parameters.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            found[name] = f"{kind} {'codes' if kind.startswith(('int', 'uint')) else 'values'}"
    return {name: found[name] for name in program.parameters if name in found}
