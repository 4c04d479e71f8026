"""Rewrites a feed-forward whose neurons are in groups: its linears, elementwise calls and deltas.

Shapes: T tokens, E experts, K experts that a token chooses, I inputs and O outputs of an expert's linear.
"""

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
from bmgraph.ir.node_role import KEY, NEURONS, ROUTER, role_of
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of
from bmgraph.passes.moefy.balanced_kmeans import EMPTY
from bmgraph.passes.moefy.expert_weights import gather_groups, split_bias, split_inputs, split_outputs
from bmgraph.passes.moefy.ffn_neurons import FeedForwardUse
from bmgraph.passes.moefy.neuron_order import gather_chosen, group_neurons, padded_indices, ungroup_neurons
from bmgraph.passes.moefy.router import ALWAYS, Router

aten = torch.ops.aten
ours = torch.ops.bmgraph


@dataclass(frozen=True)
class SplitSite:
    """A feed-forward to split: the name of its first weight, its uses, and the number of its neurons."""

    name: str
    uses: Sequence[FeedForwardUse]
    features: int


@dataclass(frozen=True)
class GroupedFeedForward(SplitSite):
    """One whose neurons are in groups: those of each expert, i64[E, size], of which every token takes the first `shared`."""

    groups: torch.Tensor
    shared: int = 0


@dataclass(frozen=True)
class Choice:
    """How tokens choose experts: the `active` ones of the highest scores, of these those of at least `threshold` times the best.

    Without a router all experts are computed, and scores are the norms of their outputs or, `by_mass`, the sums of the
    magnitudes of their neurons.
    """

    active: int
    router: Router | None
    by_mass: bool = False
    threshold: float | None = None


@dataclass(frozen=True)
class _ExpertLinear:
    """One linear of all experts: its name, weight [E, O, I] and bias [E, O].

    `spans` are the ranges of O that the gate and up take, where it is an input linear. `order` is there if deltas change it.
    """

    site: str
    weight: fx.Node
    bias: fx.Node | None
    spans: tuple[tuple[int, int], ...]
    order: _NeuronOrder | None


@dataclass(frozen=True)
class _NeuronOrder:
    """The original order of neurons in groups, for deltas, which still compute all neurons.

    `indices` i64[E, S] are indices among `count` neurons; `padded` if some groups are padded.
    """

    indices: fx.Node
    count: int
    padded: bool

    @staticmethod
    def of(editor: Editor, name: str, index: torch.Tensor, count: int, role: str) -> _NeuronOrder:
        """The order for index i64[E, S], stored as a parameter named after the linear `name`, of the role of its deltas."""
        originals = padded_indices(index, count).to(editor.program.device)
        indices = editor.parameter(editor.fresh(f"{name}_places"), originals, frozen=True, part=role)
        indices.meta["site"] = name
        return _NeuronOrder(indices, count, bool((index == EMPTY).any()))


def feedforward_input(use: FeedForwardUse) -> fx.Node:
    """The input of a feed-forward, before it is rounded."""
    node: Any = use.projections[0].linear.args[0]
    while traits_of(node).kind is Kind.ROUNDING:
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def down_input(use: FeedForwardUse) -> fx.Node:
    """The input of the down projection, in eval form."""
    node = use.down.args[0]
    assert isinstance(node, fx.Node)
    return in_eval(node)


def split_into_experts(editor: Editor, site: GroupedFeedForward, choice: Choice) -> None:
    """Rewrite all uses of one feed-forward."""
    first = site.uses[0]
    input_linears = [_split_input_linear(editor, site, linear) for linear in first.linears]
    down_weight = split_inputs(editor, first.down.args[1], site.groups)  # type: ignore[arg-type]
    order = None
    readers = [reader for use in site.uses for reader in use.delta_readers]
    if readers:
        name = linear_name(editor.program, first.down)
        order = _NeuronOrder.of(editor, name, site.groups, site.features, role_of(readers[0]))
    layers = _router_parameters(editor, site, choice.router) if choice.router is not None else ()
    always = None
    if choice.router is None and site.shared:
        always = _router_parameter(editor, site, "_router_shared", _always(len(site.groups), site.shared))
    for use in site.uses:
        call = partial(editor.call, like=use.down, site=site.name, part=ROUTER)
        if layers:
            scores = feedforward_input(use)
            for number, layer in enumerate(layers):
                entering = call(aten.relu.default, scores) if number else scores
                scores = call(aten.linear.default, entering, *layer)
        else:
            activated = _expert_values(editor, use, input_linears, _AllExperts(call))[use.down.args[0]]  # type: ignore[index]
            scores = _oracle_scores(call, activated, down_weight, choice.by_mass)
            scores = scores if always is None else call(aten.add.Tensor, scores, always)
        best = call(aten.topk.default, scores, choice.active)
        ids = call(getitem, best, 1)
        weights = None
        if choice.threshold is not None:
            weights = _weights_above(call, call(getitem, best, 0), choice.threshold, site.shared)
        experts = _ChosenExperts(editor, use.down, ids)
        values = _expert_values(editor, use, input_linears, experts)
        down_linear = _ExpertLinear(linear_name(editor.program, use.down), down_weight, None, (), None)
        call_down = partial(editor.call, like=use.down, site=down_linear.site, part=NEURONS)
        outputs = experts.product(values[use.down.args[0]], down_linear)  # type: ignore[index]
        if weights is not None:
            outputs = call_down(aten.mul.Tensor, outputs, weights)
        output = call_down(aten.sum.dim_IntList, outputs, [-2])
        if len(use.down.args) > 2:
            output = call_down(aten.add.Tensor, output, use.down.args[2])
        if order is not None:
            _restore_delta_inputs(editor, use, values, ids, weights, order)
        editor.replace(use.down, output)


def take_all(program: Program, by: str, experts: int) -> None:
    """Let every token take all experts that the pass of the text `by` made, none below a threshold."""
    for node in list(program.graph.nodes):
        if node.meta.get("pass") != by:
            continue
        if node.target is aten.topk.default:
            node.update_arg(1, experts)
        elif node.target is aten.ge.Tensor:
            node.update_arg(1, node.args[0])


def _weights_above(call: Callable[..., fx.Node], scores: fx.Node, threshold: float, shared: int) -> fx.Node:
    """f[T, K, 1]: 1 for experts whose score f[T, K] is at least that share of the best one's that is not shared, else 0.

    Scores fall along K. A best one below 0 stays, too.
    """
    best = call(aten.slice.Tensor, scores, -1, shared, shared + 1)
    below = call(aten.mul.Tensor, call(aten.abs.default, best), 1 - threshold)
    kept = call(aten.ge.Tensor, scores, call(aten.sub.Tensor, best, below))
    return call(aten.unsqueeze.default, call(aten.to.dtype, kept, scores.meta["val"].dtype), -1)


def _restore_delta_inputs(
    editor: Editor,
    use: FeedForwardUse,
    values: Mapping[fx.Node, fx.Node],
    ids: fx.Node,
    weights: fx.Node | None,
    order: _NeuronOrder,
) -> None:
    """Let deltas on the down projection read neurons in the original order, with 0 for neurons that were not chosen."""
    name = linear_name(editor.program, use.down)
    for reader in use.delta_readers:
        call = partial(editor.call, like=use.down, site=name, part=role_of(reader))
        for node in reader.all_input_nodes:
            if node in values:
                chosen = values[node] if weights is None else call(aten.mul.Tensor, values[node], weights)
                restored = ungroup_neurons(call, chosen, order.indices, ids, order.count, order.padded)
                reader.replace_input_with(node, restored)


def _split_input_linear(editor: Editor, site: GroupedFeedForward, linear: fx.Node) -> _ExpertLinear:
    """Split one input linear, which may be that of gate and up together."""
    rows = [item.rows for item in site.uses[0].projections if item.linear is linear]
    index = torch.cat([gather_groups(item, site.groups, 0, empty=EMPTY) for item in rows], 1)
    size = site.groups.shape[1]
    name = linear_name(editor.program, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    totals = [total for use in site.uses for total in use.totals.get(linear, ())]
    count = int(linear.meta["val"].shape[-1])
    return _ExpertLinear(
        name,
        split_outputs(editor, linear.args[1], index),  # type: ignore[arg-type]
        split_bias(editor, f"{name}_bias", bias, index) if isinstance(bias, fx.Node) else None,
        tuple((part * size, part * size + size) for part in range(len(rows))),
        _NeuronOrder.of(editor, name, index, count, role_of(totals[0])) if totals else None,
    )


def _router_parameters(
    editor: Editor, site: GroupedFeedForward, router: Router
) -> list[tuple[fx.Node, fx.Node]]:
    """Weight and bias of the router's layers, in order."""
    layers = {"_router_hidden": router.hidden, "_router": (router.weight, router.bias)}
    return [
        (
            _router_parameter(editor, site, end, layer[0]),
            _router_parameter(editor, site, f"{end}_bias", layer[1]),
        )
        for end, layer in layers.items()
        if layer is not None
    ]


def _router_parameter(editor: Editor, site: GroupedFeedForward, end: str, tensor: torch.Tensor) -> fx.Node:
    down = site.uses[0].down.meta["val"]
    tensor = tensor.to(editor.program.device, down.dtype)
    return editor.parameter(site.name + end, tensor, frozen=True, part=ROUTER)


def _always(experts: int, shared: int) -> torch.Tensor:
    """f[E]: what is added to scores, so that every token takes the first `shared`."""
    return torch.where(torch.arange(experts) < shared, ALWAYS, 0.0)


def _expert_values(
    editor: Editor,
    use: FeedForwardUse,
    input_linears: Sequence[_ExpertLinear],
    form: _ChosenExperts | _AllExperts,
) -> dict[fx.Node, fx.Node]:
    """Copies of the calls from the input linears to the input of `down`, with products from `form`, by the old nodes.

    What only scores experts drops nothing in training.
    """
    values: dict[fx.Node, fx.Node] = {}
    for linear, expert_linear in zip(use.linears, input_linears):
        output = form.product(linear.args[0], expert_linear)  # type: ignore[arg-type]
        for total in use.totals.get(linear, ()):
            order, term = expert_linear.order, total.args[1]
            assert order is not None
            assert isinstance(term, fx.Node)
            call = partial(editor.call, like=use.down, site=expert_linear.site)
            part = partial(call, part=role_of(total))
            groups = group_neurons(part, term, order.indices, order.padded)
            added = form.select(part, groups)
            output = call(aten.add.Tensor, output, added, part=str(total.meta[KEY]))
        spans = iter(expert_linear.spans)
        for item in use.projections:
            if item.linear is linear:
                start, stop = next(spans)
                values[item.value] = (
                    output
                    if len(expert_linear.spans) == 1
                    else editor.call(
                        aten.slice.Tensor, output, -1, start, stop, like=item.value, before=use.down
                    )
                )
    for node in use.elementwise:
        if isinstance(form, _AllExperts) and traits_of(node).kind is Kind.DROPOUT:
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        assert callable(node.target)
        arguments: Any = fx.map_arg((node.args, node.kwargs), lambda old: values.get(old, old))
        values[node] = editor.call(node.target, *arguments[0], like=node, before=use.down, **arguments[1])
    return values


@dataclass(frozen=True)
class _ChosenExperts:
    """Products with the experts that each token chose."""

    editor: Editor
    down: fx.Node
    ids: fx.Node

    def product(self, x: fx.Node, expert_linear: _ExpertLinear) -> fx.Node:
        """x [T, I] or [T, K, I] -> [T, K, O]."""
        return self.editor.call(
            ours.experts_linear.default, x, expert_linear.weight, self.ids, expert_linear.bias, like=self.down, site=expert_linear.site,
            part=NEURONS,
        )  # fmt: skip

    def select(self, call: Callable[..., fx.Node], groups: fx.Node) -> fx.Node:
        """[T, E, O] -> [T, K, O]."""
        return gather_chosen(call, groups, self.ids)


@dataclass(frozen=True)
class _AllExperts:
    """Products with all experts, for the oracle."""

    call: Callable[..., fx.Node]

    def product(self, x: fx.Node, expert_linear: _ExpertLinear) -> fx.Node:
        """x [T, I] -> [T, E, O]."""
        output = _all_products(self.call, self.call(aten.unsqueeze.default, x, -2), expert_linear.weight)
        return (
            output if expert_linear.bias is None else self.call(aten.add.Tensor, output, expert_linear.bias)
        )

    def select(self, call: Callable[..., fx.Node], groups: fx.Node) -> fx.Node:
        """[T, E, O], as it is."""
        return groups


def _oracle_scores(
    call: Callable[..., fx.Node], activated: fx.Node, down_weight: fx.Node, by_mass: bool
) -> fx.Node:
    """f[T, E]: the norm of each expert's output, from the input of its down projection [T, E, I]; or that input's mass."""
    if by_mass:
        return call(aten.sum.dim_IntList, call(aten.abs.default, activated), [-1])
    return call(aten.linalg_vector_norm.default, _all_products(call, activated, down_weight), 2, [-1])


def _all_products(call: Callable[..., fx.Node], x: fx.Node, weight: fx.Node) -> fx.Node:
    """x [T, E or 1, I] @ weight [E, O, I] -> [T, E, O]."""
    rows = call(aten.unsqueeze.default, x, -2)
    return call(aten.squeeze.dim, call(aten.matmul.default, rows, call(aten.transpose.int, weight, 1, 2)), -2)
