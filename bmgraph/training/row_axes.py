"""Which axis of each input runs over the rows of the batch, and whether ranks may share them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.row_labels import MIXED, NONE, ROWS, SUMMED, Value, every, full, has, rows_along
from bmgraph.analysis.row_runner import RowRunner
from bmgraph.analysis.structure.partial_evaluation import FAILURES
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.symbolic_dim import is_name, names_of, size_of
from bmgraph.ops.traits import unsaid_dims


@dataclass(frozen=True)
class RowAxes:
    """The axis of rows by name of input. Empty if rows cannot be shared; `reason` says why.

    `statistics`: where values are normalised or rounded by statistics of the rows that a rank has. `whole`: the loss
    depends on gathered values alone, so that every rank computes all of it.
    """

    axes: dict[str, int]
    reason: str = ""
    statistics: tuple[str, ...] = ()
    whole: bool = False

    def count(self, batch: Mapping[str, torch.Tensor]) -> int:
        """The number of rows of a batch."""
        return next(batch[name].shape[axis] for name, axis in self.axes.items())

    def share(self, batch: Mapping[str, torch.Tensor], rank: int, size: int) -> dict[str, torch.Tensor]:
        """The rows of one of `size` ranks: shares differ by one row at most; inputs without rows stay whole."""
        begin, end = (self.count(batch) * index // size for index in (rank, rank + 1))
        return {
            name: value.narrow(self.axes[name], begin, end - begin) if name in self.axes else value
            for name, value in batch.items()
        }


@dataclass(frozen=True)
class LossGraph:
    """A graph (outputs of a program, its inputs) -> (sum, count). `symbols`: as in `Program`, those of this graph.

    `gathered`: the names of outputs and inputs of which it is given the rows of all ranks.
    """

    module: fx.GraphModule
    outputs: int
    symbols: dict[Any, str]
    gathered: frozenset[str] = frozenset()


def find_rows(program: Program, loss: LossGraph | None = None) -> RowAxes:
    """The axes along which the loss is a sum over rows that do not depend on each other.

    `program` returns (sum, count, ...), or what `loss` takes. Every free size of an input is tried: not its place nor its
    number makes it the batch.
    """
    names = [dim for spec in program.inputs for dim in spec.shape if is_name(dim)]
    if not names:
        return RowAxes({}, "all sizes of its inputs are fixed: capture it with a batch of 2 or more")
    reasons: dict[str, str] = {}
    for name in dict.fromkeys(map(str, names)):
        axes = {spec.name: _axes_of(spec.shape, name) for spec in program.inputs}
        twice = next((key for key, found in axes.items() if len(found) > 1), None)
        derived = next((spec.name for spec in program.inputs if _is_derived(spec.shape, name)), None)
        if twice or derived:
            reasons[name] = (
                f"input {twice!r} has it twice" if twice else f"a size of input {derived!r} is made of it"
            )
            continue
        held = {key: found[0] for key, found in axes.items() if found}
        found = _tried(program, loss, name, held)
        if found.axes:
            return found
        reasons[name] = found.reason
    return RowAxes({}, "; ".join(f"along {name!r} {reason}" for name, reason in reasons.items()))


def _axes_of(shape: tuple[int | str, ...], name: str) -> list[int]:
    return [axis for axis, dim in enumerate(shape) if dim == name]


def _is_derived(shape: tuple[int | str, ...], name: str) -> bool:
    """Whether a size is computed from another."""
    return any(isinstance(dim, str) and dim != name and name in (names_of(dim) or [name]) for dim in shape)


def _tried(program: Program, loss: LossGraph | None, name: str, axes: dict[str, int]) -> RowAxes:
    """The axes if the inputs can be shared along the size `name`, else the reason why not."""
    runner = RowRunner(_symbols(program.symbols, name))
    nodes = placeholders(program.graph)
    values = {key: _input(program, key, name, axes) for key in nodes}
    try:
        found = runner.run(
            program.graph,
            {nodes[key]: value for key, value in values.items()},
            lambda node: program.tensor(str(node.target)),
        )
        if loss is not None:
            graph, module = loss.module.graph, loss.module
            names = [*(spec.name for spec in program.outputs), *values]
            given = [*found[: loss.outputs], *values.values()]
            given = [
                _gathered(key, value) if key in loss.gathered else value for key, value in zip(names, given)
            ]
            arguments = [node for node in graph.nodes if node.op == "placeholder"]
            runner.symbols = _symbols(loss.symbols, name)
            found = runner.run(
                graph, dict(zip(arguments, given)), lambda node: getattr(module, str(node.target))
            )
    except FAILURES as error:
        return RowAxes({}, f"it cannot be followed ({type(error).__name__}: {str(error).splitlines()[0]})")
    except _OutOfOrder as error:
        return RowAxes({}, str(error))
    whole = loss is not None and bool(loss.gathered) and all(map(_is_none, found[:2]))
    if whole:
        return RowAxes(axes, "", tuple(dict.fromkeys(map(_place, runner.statistics))), True)
    for what, term in zip(("loss", "number of items"), found[:2]):
        reason = _reason(runner, what, term)
        if reason:
            return RowAxes({}, reason)
    return RowAxes(axes, "", tuple(dict.fromkeys(map(_place, runner.statistics))))


class _OutOfOrder(Exception):
    """What is to be gathered does not have its rows along the first axis."""


def _gathered(name: str, value: Value) -> Value:
    """Rows of all ranks, which depend on none of this rank's own. Raises _OutOfOrder unless they stand in order."""
    shape = tuple(value.tensor.shape)
    in_order = bool(shape) and shape[0] % ROWS == 0 and not value.numbered
    if not in_order or not torch.equal(value.labels, rows_along(shape, 0)):
        raise _OutOfOrder(
            f"{name!r} cannot be gathered: its first axis does not hold one row of the batch after the other, each computed "
            "from itself alone (return two views of the rows as two outputs)"
        )
    more = (2 * shape[0], *shape[1:])
    return Value(torch.empty(more, dtype=value.tensor.dtype, device="meta"), full(more, NONE))


def _is_none(term: object) -> bool:
    return isinstance(term, Value) and every(term.labels, NONE)


def _symbols(names: dict[Any, str], name: str) -> frozenset[Any]:
    return frozenset(symbol for symbol, found in names.items() if found == name)


def _reason(runner: RowRunner, what: str, term: object) -> str:
    """Why a term is no sum over rows that ranks can share; empty if it is one."""
    if has(term, MIXED) and runner.meeting:
        node = runner.meeting[0]
        return f"rows meet in {node.target} at {_place(node)!r}{unsaid_dims(node)}"
    if not isinstance(term, Value) or not every(term.labels, SUMMED):
        return f"the {what} is not a sum over all rows"
    if term.numbered:
        at = f" at {_place(runner.numbering[0])!r}" if runner.numbering else ""
        return f"the {what} depends on the number of a row{at}"
    return ""


def _place(node: fx.Node) -> str:
    return str(node.meta.get("scope") or node.name)


def _input(program: Program, key: str, name: str, axes: dict[str, int]) -> Value:
    spec = next(spec for spec in program.inputs if spec.name == key)
    sizes = _sizes(program, name)
    shape = tuple(size_of(dim, sizes) or 1 for dim in spec.shape)
    labels = rows_along(shape, axes[key]) if key in axes else full(shape, 0)
    return Value(torch.empty(shape, dtype=spec.dtype, device="meta"), labels)


def _sizes(program: Program, name: str) -> dict[str, int]:
    """A small size for each free dimension; that of rows differs from all others where their ranges allow it."""
    found = {}
    names = dict.fromkeys(dim for spec in program.inputs for dim in spec.shape if is_name(dim))
    for index, dim in enumerate(map(str, names)):
        bounds = program.ranges.get(dim)
        found[dim] = ROWS if dim == name else max(ROWS + 2 + index, bounds.low if bounds else 0)
        if bounds and bounds.high is not None and dim != name:
            found[dim] = min(found[dim], bounds.high)
    return found
