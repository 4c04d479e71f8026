"""A feed-forward whose neurons stand in groups: how its linears, what is between them, and deltas on them are rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers experts_linear)
from bmgraph.analysis.structure.linears import linear_name
from bmgraph.ir.editor import Editor
from bmgraph.ir.eval_form import in_eval
from bmgraph.ir.node_role import DELTA, NEURONS, ROUTER
from bmgraph.passes.moefy.balanced_kmeans import EMPTY
from bmgraph.passes.moefy.expert_weights import pick, split_bias, split_inputs, split_outputs
from bmgraph.passes.moefy.ffn_neurons import Neurons
from bmgraph.passes.moefy.neuron_order import in_groups, in_line, of_chosen, places_of
from bmgraph.passes.moefy.router import Router
from bmgraph.verify.weight_only_check import ROUNDINGS

aten = torch.ops.aten
ours = torch.ops.bmgraph


@dataclass(frozen=True)
class Grouped:
    """A feed-forward: the name of its first weight, its uses, the neurons of each expert, i64[experts, size], and the
    number of neurons in all."""

    name: str
    uses: Sequence[Neurons]
    groups: torch.Tensor
    features: int


@dataclass(frozen=True)
class _Front:
    """One linear of all experts: its name, its weight [E, O, I] and bias [E, O], for each of the gate and up that it
    makes the part of O, and where deltas change it the places that its outputs had."""

    site: str
    weight: fx.Node
    bias: fx.Node | None
    spans: tuple[tuple[int, int], ...]
    line: _Line | None


@dataclass(frozen=True)
class _Line:
    """Where the neurons in groups stood before, for deltas, which go on to work on all of them: places i64[E, S] among
    `count`; whether some only fill a group up."""

    places: fx.Node
    count: int
    fills: bool

    @staticmethod
    def of(editor: Editor, name: str, index: torch.Tensor, count: int) -> _Line:
        """The places of index i64[E, S], kept as a parameter named after the linear `name`."""
        kept = places_of(index, count).to(editor.program.device)
        places = editor.parameter(editor.fresh(f"{name}_places"), kept, frozen=True, part=DELTA)
        places.meta["site"] = name
        return _Line(places, count, bool((index == EMPTY).any()))


def entering(use: Neurons) -> fx.Node:
    """What a feed-forward reads, before it is rounded."""
    node: Any = use.entrances[0].node.args[0]
    while node.target in ROUNDINGS:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def entering_down(use: Neurons) -> fx.Node:
    """What the last linear reads, in eval form."""
    node = use.down.args[0]
    assert isinstance(node, fx.Node)
    return in_eval(node)


def part_neurons(editor: Editor, site: Grouped, active: int, router: Router | None) -> None:
    """Rewrite all uses of one feed-forward."""
    first = site.uses[0]
    fronts = [_front(editor, site, linear) for linear in first.linears]
    last = split_inputs(editor, first.down.args[1], site.groups)  # type: ignore[arg-type]
    line = None
    if any(use.readers for use in site.uses):
        line = _Line.of(editor, linear_name(editor.program, first.down), site.groups, site.features)
    readers = _router_parameters(editor, site, router) if router is not None else ()
    for use in site.uses:
        call = partial(editor.call, like=use.down, site=site.name, part=ROUTER)
        if readers:
            hidden = call(aten.relu.default, call(aten.linear.default, entering(use), *readers[:2]))
            scores = call(aten.linear.default, hidden, *readers[2:])
        else:
            inside = _through(editor, use, fronts, _Everywhere(call))[use.down.args[0]]  # type: ignore[index]
            scores = _true_scores(call, inside, last)
        ids = call(getitem, call(aten.topk.default, scores, active), 1)
        chosen = _Chosen(editor, use.down, ids)
        values = _through(editor, use, fronts, chosen)
        down = _Front(linear_name(editor.program, use.down), last, None, (), None)
        finish = partial(editor.call, like=use.down, site=down.site, part=NEURONS)
        made = finish(aten.sum.dim_IntList, chosen.product(values[use.down.args[0]], down), [-2])  # type: ignore[index]
        if len(use.down.args) > 2:
            made = finish(aten.add.Tensor, made, use.down.args[2])
        if line is not None:
            _read_in_line(editor, use, values, ids, line)
        editor.replace(use.down, made)


def _read_in_line(
    editor: Editor, use: Neurons, values: Mapping[fx.Node, fx.Node], ids: fx.Node, line: _Line
) -> None:
    """Let deltas on the last linear read neurons as they stood before, 0 where a token did not choose them."""
    call = partial(editor.call, like=use.down, site=linear_name(editor.program, use.down), part=DELTA)
    for reader in use.readers:
        for node in reader.all_input_nodes:
            if node in values:
                whole = in_line(call, values[node], line.places, ids, line.count, line.fills)
                reader.replace_input_with(node, whole)


def _front(editor: Editor, site: Grouped, linear: fx.Node) -> _Front:
    rows = [item.rows for item in site.uses[0].entrances if item.node is linear]
    index = torch.cat([pick(item, site.groups, 0, empty=EMPTY) for item in rows], 1)
    size = site.groups.shape[1]
    name = linear_name(editor.program, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    changed = any(linear in use.changes for use in site.uses)
    return _Front(
        name,
        split_outputs(editor, linear.args[1], index),  # type: ignore[arg-type]
        split_bias(editor, f"{name}_bias", bias, index) if isinstance(bias, fx.Node) else None,
        tuple((place * size, place * size + size) for place in range(len(rows))),
        _Line.of(editor, name, index, int(linear.meta["val"].shape[-1])) if changed else None,
    )


def _router_parameters(editor: Editor, site: Grouped, router: Router) -> tuple[fx.Node, ...]:
    down = site.uses[0].down
    named = (
        ("_router_hidden", router.first), ("_router_hidden_bias", router.first_bias), ("_router", router.second),
        ("_router_bias", router.second_bias),
    )  # fmt: skip
    return tuple(
        editor.parameter(site.name + end, tensor.to(down.meta["val"].dtype), frozen=True, part=ROUTER)
        for end, tensor in named
    )


def _through(
    editor: Editor, use: Neurons, fronts: Sequence[_Front], form: _Chosen | _Everywhere
) -> dict[fx.Node, fx.Node]:
    """What stands for each call from the linears in front to what enters `down`, their products being of this form."""
    values: dict[fx.Node, fx.Node] = {}
    for linear, front in zip(use.linears, fronts):
        made = form.product(linear.args[0], front)  # type: ignore[arg-type]
        for change in use.changes.get(linear, ()):
            assert front.line is not None
            call = partial(editor.call, like=use.down, site=front.site, part=DELTA)
            groups = in_groups(call, change, front.line.places, front.line.fills)
            made = call(aten.add.Tensor, made, form.of(call, groups))
        spans = iter(front.spans)
        for item in use.entrances:
            if item.node is linear:
                start, stop = next(spans)
                values[item.value] = (
                    made
                    if len(front.spans) == 1
                    else editor.call(
                        aten.slice.Tensor, made, -1, start, stop, like=item.value, before=use.down
                    )
                )
    for node in use.between:
        assert callable(node.target)
        given: Any = fx.map_arg((node.args, node.kwargs), lambda old: values.get(old, old))
        values[node] = editor.call(node.target, *given[0], like=node, before=use.down, **given[1])
    return values


@dataclass(frozen=True)
class _Chosen:
    """Products with the experts that each token chose."""

    editor: Editor
    down: fx.Node
    ids: fx.Node

    def product(self, x: fx.Node, front: _Front) -> fx.Node:
        """[T, K, O]."""
        return self.editor.call(
            ours.experts_linear.default, x, front.weight, self.ids, front.bias, like=self.down, site=front.site,
            part=NEURONS,
        )  # fmt: skip

    def of(self, call: Callable[..., fx.Node], groups: fx.Node) -> fx.Node:
        """[T, E, O] -> [T, K, O]."""
        return of_chosen(call, groups, self.ids)


@dataclass(frozen=True)
class _Everywhere:
    """Products with all experts, x [T, I] or [T, E, I] -> [T, E, O], as an oracle takes them."""

    call: Callable[..., fx.Node]

    def product(self, x: fx.Node, front: _Front) -> fx.Node:
        made = _all_products(self.call, self.call(aten.unsqueeze.default, x, -2), front.weight)
        return made if front.bias is None else self.call(aten.add.Tensor, made, front.bias)

    def of(self, call: Callable[..., fx.Node], groups: fx.Node) -> fx.Node:
        return groups


def _true_scores(call: Callable[..., fx.Node], inside: fx.Node, last: fx.Node) -> fx.Node:
    """The norm of what each expert gives, from what enters the last product of each [T, E, I]."""
    return call(aten.linalg_vector_norm.default, _all_products(call, inside, last), 2, [-1])


def _all_products(call: Callable[..., fx.Node], x: fx.Node, weight: fx.Node) -> fx.Node:
    """x [T, E or 1, I] @ weight [E, O, I] -> [T, E, O]."""
    rows = call(aten.unsqueeze.default, x, -2)
    return call(aten.squeeze.dim, call(aten.matmul.default, rows, call(aten.transpose.int, weight, 1, 2)), -2)
