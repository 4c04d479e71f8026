"""Runs a graph at small sizes on labels of rows in place of numbers, by the rule of each operator.

What is made as long as there are rows has one element for each of them. The number of a row may choose what belongs to it
(`x[arange(rows), last]`), but nothing may be computed from it: ranks number their rows by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.row_labels import (
    MIXED,
    NONE,
    ROWS,
    SUMMED,
    Labels,
    Size,
    Value,
    every,
    full,
    has,
    is_balanced,
    leaves,
    like,
    plain,
    rows_along,
    some,
)  # fmt: skip
from bmgraph.analysis.row_rules import (
    CONSTANTS,
    REARRANGED,
    SIZES_ONLY,
    STATISTICS,
    keeps_sums,
    pointwise,
    rule_of,
)
from bmgraph.analysis.structure.partial_evaluation import FAILURES
from bmgraph.ir.evaluation import arguments
from bmgraph.ops.trait_row import Dims
from bmgraph.ops.traits import calls, place_of, traits_of
from bmgraph.utils.stored_tensor import tensor_on
from bmgraph.utils.torch_internals import decomposed

aten = torch.ops.aten

MOVES = REARRANGED | {Dims.INSERTED}
"""Calls whose rule puts labels where it puts elements."""

PICKS = frozenset({Dims.INDEX, Dims.INDEX_SELECT, Dims.GATHER})
"""Calls that pick elements by their numbers."""

MOST_KNOWN = 1 << 20
"""Index tensors with more elements are not computed."""


@dataclass
class RowRunner:
    """Runs graphs on labels. `symbols` are those of the number of rows.

    Found on the way: `meeting`, the calls in which rows first meet; `statistics`, those whose statistics are of each
    rank's rows; `numbering`, those that compute from the number of a row.
    """

    symbols: frozenset[Any]
    meeting: list[fx.Node] = field(default_factory=list)
    statistics: list[fx.Node] = field(default_factory=list)
    numbering: list[fx.Node] = field(default_factory=list)

    def run(
        self, graph: fx.Graph, inputs: Mapping[fx.Node, Value], constant: Callable[[fx.Node], torch.Tensor]
    ) -> list[Any]:
        """The returned values of a graph; `constant` gives the tensor of a `get_attr`."""
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node]
            elif node.op == "get_attr":
                tensor = constant(node)
                known = not tensor.is_floating_point() and tensor.device.type == "cpu"
                held = tensor if known else tensor_on(tensor, torch.device("meta"))
                values[node] = Value(held, full(tensor.shape, NONE), known)
            elif node.op == "call_function":
                values[node] = self._call(node, values)
            else:
                returned: Any = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
                return [values.get(item, item) for item in returned]
        raise AssertionError("a graph has an output")

    def _call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.target is getitem:
            return values[node.args[0]][node.args[1]]  # type: ignore[index]
        args, kwargs = arguments(node, values.__getitem__)
        kwargs.pop("device", None)
        tensors = [item for item in leaves((args, kwargs)) if isinstance(item, Value)]
        sizes = [item for item in leaves((args, kwargs)) if isinstance(item, Size)]
        result, known = _computed(node, args, kwargs, tensors)
        if not isinstance(result, (torch.Tensor, tuple, list)):
            return Size(result, self._is_of_rows(node.meta["val"]))
        if not tensors or traits_of(node).dims in SIZES_ONLY:
            labels = _made_labels(node, args, kwargs, result)
        elif rule_of(node) is None:
            labels = self._composite(node, values, result)
        else:
            labels = _labels(node, args, kwargs, result)
        many = isinstance(result, (tuple, list))
        results: list[Any] = list(result) if many else [result]
        all_labels = labels if isinstance(labels, (tuple, list)) else [labels] * len(results)
        fakes = node.meta["val"] if many else [node.meta["val"]]
        numbered = _chooses_by_number(node, args, sizes, tensors)
        made = [
            self._made(node, item, label, fake, known, numbered)
            for item, label, fake in zip(results, all_labels, fakes)
        ]
        self._note(node, tensors, made)
        return made if many else made[0]

    def _composite(self, node: fx.Node, values: Mapping[fx.Node, Any], result: Any) -> Any:
        """The labels of what other operators make up; without them an unknown operator mixes what it is given."""
        module = decomposed(node)
        if module is None:
            given = [values[item] for item in node.all_input_nodes]
            free = all(every(item.labels, NONE) for item in given if isinstance(item, Value))
            return like(result, NONE if free and not _holds_rows(given) else MIXED)
        inner = RowRunner(self.symbols)
        arguments = [item for item in module.graph.nodes if item.op == "placeholder"]
        inputs = dict(zip(arguments, (values[item] for item in node.all_input_nodes)))
        found = inner.run(module.graph, inputs, lambda item: getattr(module, str(item.target)))
        self.statistics += [node] * len(inner.statistics)
        numbered = any(item.numbered for item in found if isinstance(item, Value))
        labels = [full(item.labels.shape, MIXED) if numbered else item.labels for item in found]
        return labels if isinstance(result, (tuple, list)) else labels[0]

    def _made(
        self, node: fx.Node, tensor: torch.Tensor, labels: Labels, fake: Any, known: bool, numbered: bool
    ) -> Value:
        """One result: what depends on no row but is as long as there are rows has one element for each."""
        labels = labels.expand(tensor.shape)
        long = [axis for axis, size in enumerate(fake.shape) if self._is_of_rows(size)]
        if long and some(labels, NONE):
            size = fake.shape[long[0]]
            exact = len(long) == 1 and (
                self._is_rows(size) or (_makes_equal_parts(node) and self._is_multiple(size))
            )
            divides = exact and tensor.shape[long[0]] % ROWS == 0
            rows = rows_along(tuple(tensor.shape), long[0]) if divides else full(tensor.shape, MIXED)
            labels = torch.where(labels == NONE, rows, labels)
            numbered = numbered or not _makes_equal_parts(node)  # unlike the first rows of a table
        if known and numbered and len(long) == 1 and not bool(tensor.ne(tensor.narrow(long[0], 0, 1)).any()):
            numbered = False
        return Value(tensor, labels, known, numbered or not is_balanced(labels))

    def _note(self, node: fx.Node, tensors: list[Value], made: list[Value]) -> None:
        if any(has(item, MIXED) for item in made) and not any(has(item, MIXED) for item in tensors):
            self.meeting.append(node)
        if _any_numbered(made) and not _any_numbered(tensors):
            self.numbering.append(node)
        if (
            traits_of(node).dims in STATISTICS
            and int(tensors[0].labels.max()) > int(tensors[0].labels.min())
            and _of_batch(node)
        ):
            self.statistics.append(node)

    def _is_of_rows(self, size: Any) -> bool:
        symbolic = getattr(size, "node", None)
        return symbolic is not None and bool(symbolic.expr.free_symbols & self.symbols)

    def _is_multiple(self, size: Any) -> bool:
        """Whether a size is the number of rows times what does not depend on it."""
        return any((size.node.expr / symbol).free_symbols.isdisjoint(self.symbols) for symbol in self.symbols)

    def _is_rows(self, size: Any) -> bool:
        return size.node.expr in self.symbols


def _makes_equal_parts(node: fx.Node) -> bool:
    """Whether a call makes parts of equal values, one after the other, of what depends on no row; one for each row where a
    size is a multiple of the number of rows."""
    return traits_of(node).dims in CONSTANTS | {Dims.EXPANDED} or calls(node, aten.repeat)


def _any_numbered(values: list[Value]) -> bool:
    """Whether something is computed from the number of a row, other than such numbers themselves."""
    return any(item.numbered and not item.known for item in values)


def _of_batch(node: fx.Node) -> bool:
    """Whether statistics are of the batch, not the running ones of a norm."""
    name = traits_of(node).train
    place = place_of(node.target, name)
    given = place is not None and len(node.args) > place
    return bool(node.args[place] if given else node.kwargs.get(name, True))  # type: ignore[index]


def _made_labels(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    """What is made of sizes; `ones_like` of rows is one for each of them."""
    numbers = [item for item in (*args, *kwargs.values()) if not isinstance(item, (list, tuple))]
    if not calls(node, aten.arange) and _holds_rows(numbers):
        return like(result, MIXED)
    if isinstance(result, torch.Tensor) and traits_of(node).dims is Dims.SIZES_ALONE:
        labels = args[0].labels
        return torch.where(labels >= SUMMED, NONE, labels)
    return like(result, NONE)


def _labels(node: fx.Node, args: Any, kwargs: Any, result: Any) -> Any:
    given = leaves((args, kwargs))
    tensors = [item for item in given if isinstance(item, Value)]
    rule = rule_of(node)
    assert rule is not None
    if all(every(item.labels, NONE) for item in tensors) and traits_of(node).dims not in MOVES:
        return like(result, MIXED if _holds_rows(given) else NONE)
    if not _keeps_sums(node, rule, tensors):
        return like(result, MIXED)
    try:
        return rule(node, args, kwargs, result)
    except FAILURES:
        return like(result, MIXED)


def _holds_rows(given: list[Any]) -> bool:
    return any(isinstance(item, Size) and item.of_rows for item in given)


def _keeps_sums(node: fx.Node, rule: Any, tensors: list[Value]) -> bool:
    """Whether the rule knows what becomes of sums over rows, if there are any."""
    if not any(has(item, SUMMED) for item in tensors) or rule is pointwise:
        return True
    if traits_of(node).dims in REARRANGED:
        return True
    return keeps_sums(node) and all(every(item.labels, SUMMED) for item in tensors)


def _chooses_by_number(node: fx.Node, args: Any, sizes: list[Size], tensors: list[Value]) -> bool:
    """Whether the result depends on the number of a row."""
    dims = traits_of(node).dims
    if dims in SIZES_ONLY:
        return False
    if calls(node, aten.arange):
        return any(item.of_rows for item in sizes)
    if dims not in PICKS:
        return any(item.numbered for item in tensors)
    indices = [item for item in leaves(args[1:]) if isinstance(item, Value)]
    by_number = [item for item in indices if item.numbered]
    picks_its_own = all(item.known for item in by_number) and not has(args[0], NONE)
    return args[0].numbered or (bool(by_number) and not picks_its_own)


def _computed(node: fx.Node, args: Any, kwargs: Any, tensors: list[Value]) -> tuple[Any, bool]:
    """The result of a call, and whether its numbers are known: those made of sizes and known tensors are."""
    target: Any = node.target
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    if all(item.known for item in tensors) and not random:
        with torch.no_grad():
            result = target(*plain(args, lambda item: item.tensor), **plain(kwargs, lambda item: item.tensor))
        if not isinstance(result, torch.Tensor) or result.numel() <= MOST_KNOWN:
            return result, isinstance(result, torch.Tensor)
    made = {} if tensors else {"device": "meta"}
    return target(
        *plain(args, lambda item: item.tensor.to("meta")),
        **plain(kwargs, lambda item: item.tensor.to("meta")), **made,
    ), False  # fmt: skip
