"""A loss that is a sum of terms, such as `ce + 0.01 * aux`: each is a mean over items of its own.

With S_i the sum and N_i the number of items of term i over all ranks and micro-batches, the loss is the sum of S_i / N_i. A
step returns S_0 + sum of (N_0 / N_i) S_i, and divides by N_0 as ever. The **shares** N_0 / N_i are tensors that the graph
reads: numbers of items follow from the inputs alone, so they are counted and reduced before the graph runs.

A term that is no mean over items, or in which rows meet (the balance of a router), is computed for each rank and
micro-batch by itself and averaged over these: it counts as one item of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.errors import InputError
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import GraphRunner
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import fake_parameter, value
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.training.counting_graph import counting_graph
from bmgraph.training.loss_terms import loss_node, mean_terms, scales
from bmgraph.training.row_axes import find_rows
from bmgraph.training.step_program import CONSTANT
from bmgraph.utils.torch_internals import fake_mode_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LossCounts:
    """How many items each term of a loss has in a batch, and where the step reads the shares.

    `shares`: the tensors of a step that hold N_0 / N_i, for every term but the first.
    """

    graph: fx.Graph
    shares: tuple[str, ...]

    def count(self, rows: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """f64[terms]: the number of items of each term in some rows, on the CPU. Not collective."""
        inputs = [rows[str(node.target)] for node in self.graph.nodes if node.op == "placeholder"]
        with torch.no_grad():
            found = GraphRunner(self.graph, tensors).run(*inputs)
        return torch.tensor([float(item) for item in found], dtype=torch.float64)

    def share(self, counts: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write the shares of counts over all ranks and micro-batches. Raises InputError if a term has no item."""
        first, *others = counts.tolist()
        if not all(count > 0 for count in (first, *others)):
            raise InputError("no item of the batch counts for a term of the loss: every label is ignored")
        for name, count in zip(self.shares, others):
            tensors[name].fill_(first / count)


@dataclass(frozen=True)
class WeightedTerms:
    """A program that returns S_0 + shares * S_i, N_0 and its writes; `rows` returns what ranks must be able to share.

    `apart` returns f[terms], all S_i in one tensor, instead of their sum. `by_part`: the terms that are
    computed for each rank and micro-batch by itself, in words.
    """

    program: Program
    rows: Program
    apart: Program
    counts: LossCounts
    by_part: tuple[str, ...]


@dataclass(frozen=True)
class _Term:
    total: fx.Node
    count: fx.Node
    by_part: str = ""


def weighted_terms(program: Program, name: str, shared: bool) -> WeightedTerms | None:
    """The terms of the loss `name` if it is a sum of several, of which one at least is a mean over items; None for another.

    `shared`: ranks or micro-batches share the rows of a batch, so that terms in which rows meet count by part.
    """
    split = program.clone()
    returned: Any = output_node(split.graph).args[0]
    writes = returned[len(program.outputs) :]
    with split.edit(by="loss") as editor:
        addends = _addends(editor, loss_node(split, name))
        if len(addends) == 1:
            return None
        terms = [_term(editor, addend, program if shared else None, writes) for addend in addends]
        terms.sort(key=lambda term: bool(term.by_part))  # stable: a mean leads
        if terms[0].by_part:
            return None
        means = [term for term in terms if not term.by_part]
        counting = counting_graph(split, [term.count for term in terms])
        rows = _returning(split, _sum(editor, [term.total for term in means]), terms[0].count, writes)
        totals = [_call(editor, aten.to.dtype, term.total, torch.float32, like=term.total) for term in terms]
        apart = _returning(
            split, _call(editor, aten.stack.default, totals, like=totals[0]), terms[0].count, writes
        )
        shares = [_share(split, index, terms[0].total) for index in range(1, len(terms))]
        scaled = [
            _call(editor, aten.mul.Tensor, term.total, share, like=term.total)
            for term, share in zip(terms[1:], shares)
        ]
        total = _sum(editor, [terms[0].total, *scaled])
        output_node(split.graph).args = ((total, terms[0].count, *writes),)
    by_part = tuple(term.by_part for term in terms if term.by_part)
    counts = LossCounts(counting, tuple(str(share.target) for share in shares))
    return WeightedTerms(split, rows, apart, counts, by_part)


def _call(editor: Editor, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """A call at the end of the graph."""
    return editor.call(target, *args, like=like, before=output_node(editor.graph), **kwargs)


def _addends(editor: Editor, node: fx.Node) -> list[fx.Node]:
    """What a scalar is the sum of; factors are applied to each."""
    row = traits_of(node)
    adds, reversed_ = row.kind in (Kind.SUM, Kind.DIFFERENCE), row.kind is Kind.DIFFERENCE
    nodes = [item for item in node.args if isinstance(item, fx.Node)]
    scalars = all(isinstance(value(item), torch.Tensor) and value(item).dim() == 0 for item in nodes)
    if node.kwargs or not nodes or not scalars:
        return [node]
    if adds and len(nodes) == len(node.args) == 2:
        first, second = (_addends(editor, item) for item in nodes)
        if reversed_:  # rsub(a, b) = b - a
            return [*_negated(editor, first), *second]
        return [*first, *(_negated(editor, second) if row.lowers else second)]
    inner = _addends(editor, nodes[0]) if len(nodes) == 1 and node.args[0] is nodes[0] else []
    if len(inner) < 2 or not (adds or scales(node)):
        return [node]
    if scales(node):
        return [_call(editor, node.target, item, *node.args[1:], like=node) for item in inner]
    others = _negated(editor, inner[1:]) if reversed_ else inner[1:]
    return [_call(editor, node.target, inner[0], *node.args[1:], like=node), *others]


def _negated(editor: Editor, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [_call(editor, aten.neg.default, node, like=node) for node in nodes]


def _term(editor: Editor, node: fx.Node, shared: Program | None, writes: Sequence[fx.Node]) -> _Term:
    """The sum and count of an addend: those of a mean, whose rows ranks can share, or itself and one."""
    found = mean_terms(editor, node, True)
    why = f"{node.target} is no mean over items"
    if found is not None:
        why = ""
        if shared is not None:
            axes = find_rows(_returning(editor.program, *found, writes))
            why = "" if axes.axes else "rows meet in it, or do not add up to it"
    if not why and found is not None:
        return _Term(*found)
    one = _call(editor, aten.ones_like.default, node, like=node, dtype=torch.int64)
    return _Term(node, one, f"{node.meta.get('scope') or node.name!r} ({why})")


def _returning(program: Program, total: fx.Node, count: fx.Node, writes: Sequence[fx.Node]) -> Program:
    """A copy of a program that returns these values."""
    output = output_node(program.graph)
    before = output.args
    output.args = ((total, count, *writes),)
    copy = program.clone()
    output.args = before
    copy.graph.eliminate_dead_code()
    return copy


def _sum(editor: Editor, nodes: Sequence[fx.Node]) -> fx.Node:
    total = nodes[0]
    for node in nodes[1:]:
        total = _call(editor, aten.add.Tensor, total, node, like=node)
    return total


def _share(program: Program, index: int, like: fx.Node) -> fx.Node:
    """A node that reads a share, which is one until items are counted."""
    name = f"{CONSTANT}share_{index}"
    program.buffers[name] = torch.ones((), dtype=value(like).dtype, device=program.device)
    last = [node for node in program.graph.nodes if node.op == "placeholder"][-1]
    mode = fake_mode_of(list(program.graph.nodes))
    assert mode is not None
    with program.graph.inserting_after(last):
        node = program.graph.create_node("get_attr", name)
    node.meta["val"] = fake_parameter(program.buffers[name], mode)
    return node
