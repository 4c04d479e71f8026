"""Traces every value to the products (linears, attentions, matrix products) that it is computed from.

One walk over a graph, in order; layout, scaling and activations are looked through.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.ir.node_role import NodeRole, ends_delta, has_role, is_delta
from bmgraph.ops.trait_row import Dims, Kind, Lookup
from bmgraph.ops.traits import is_tagged_pointwise, traits_of

SCALARS = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
"""Types of values that are sizes or numbers, not tensors."""

Source = tuple[fx.Node, fx.Node | None]
"""A product, and the first call that selects a part of its output, if any."""

Origin = dict[Source, str]
"""The products that a value is computed from -> the activation after each ("" for none). Empty: computed from
parameters, positions and masks alone."""

SOFTMAX = "softmax"
COMPOSED = "composed"
"""Activation that consists of several operators."""

MAX_SOURCES = 12
"""A value with more sources than this counts as unknown (None): no pattern has so many."""

TRANSPARENT = frozenset({Kind.DROPOUT, Kind.ROUNDING, Kind.CAST, Kind.RESHAPE})
"""Calls that `base` looks through."""
PASSES_ORIGIN = TRANSPARENT | {Kind.LAYOUT, Kind.SPLIT, Kind.NORM}
"""Calls whose output has the origin of their first argument."""
COMBINES = frozenset({Kind.SCALING, Kind.QUOTIENT, Kind.MASKING})
"""Calls whose output has the origins of all arguments."""


def stem(node: fx.Node) -> str:
    """Name of a node's operator without namespace and overload ("linear", "add"); "getitem", ... for Python functions."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "")


@dataclass
class Core:
    """One attention and its operands.

    `node` is the fused operator, with its `mask` and `is_causal`; or, for a decomposed attention, the product of
    probabilities and values, with `scores` (queries times keys) and `softmax`.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None = None
    is_causal: bool = False
    scores: fx.Node | None = None
    softmax: fx.Node | None = None


@dataclass
class Flow:
    """What one walk finds in a graph. Lists are in graph order."""

    graph: fx.Graph
    origins: dict[fx.Node, Origin | None] = field(default_factory=dict)
    """None for a value of other origin: embeddings, residual sums, convolutions, floating-point inputs."""
    weights: dict[fx.Node, bool] = field(default_factory=dict)
    """Whether a node is computed from parameters and buffers alone."""
    linears: list[fx.Node] = field(default_factory=list)
    experts: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    """Product with the weights of chosen experts -> (its input, the expression of all experts' weights)."""
    cores: list[Core] = field(default_factory=list)
    embeddings: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)


def walk(graph: fx.Graph) -> Flow:
    """Trace all values of a graph. Time is linear in the number of nodes."""
    flow = Flow(graph)
    softmaxes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        flow.weights[node] = node.op == "get_attr" or (
            node.op == "call_function" and bool(inputs) and all(flow.weights[item] for item in inputs)
        )
        found = _origin(flow, node, softmaxes)
        flow.origins[node] = found if found is None or len(found) <= MAX_SOURCES else None
    return flow


def base(node: Any) -> Any:
    """The value before dropout, casts, rounding, reshapes, smoothing and the addition of deltas."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        smoothed = has_role(node, NodeRole.SMOOTHING)
        if not (ends_delta(node) or smoothed or traits_of(node).kind in TRANSPARENT):
            break
        node = node.args[0]
    return node


def products(origin: Origin | None) -> list[fx.Node]:
    """The distinct products of an origin, in order."""
    return list(dict.fromkeys(node for node, _ in origin)) if origin else []


def _origin(flow: Flow, node: fx.Node, softmaxes: dict[fx.Node, fx.Node]) -> Origin | None:
    """The origin of one node. Sites are added to `flow`, softmaxes (by the product that they normalize) to `softmaxes`."""
    if node.op == "placeholder":
        value = node.meta.get("val")
        return None if isinstance(value, torch.Tensor) and value.is_floating_point() else {}
    if node.op != "call_function" or isinstance(node.meta.get("val"), SCALARS):
        return {}
    if is_delta(node):
        return flow.origins[node.args[0]] if ends_delta(node) else None  # type: ignore[index]
    kind = traits_of(node).kind
    special = _site(flow, node, softmaxes)
    if special is not None:
        return special or None
    inputs = [flow.origins[item] for item in node.all_input_nodes]
    if all(item is not None and not item for item in inputs):
        return {}
    first = flow.origins.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else {}
    if kind in PASSES_ORIGIN:
        return first
    if kind is Kind.SELECTION:
        return (
            None if first is None else {(item, taken or node): flag for (item, taken), flag in first.items()}
        )
    if kind is Kind.SOFTMAX:
        for item in products(first):
            softmaxes.setdefault(item, node)
        return None if first is None else dict.fromkeys(first, SOFTMAX)
    if kind is Kind.SUM:
        return _sum(inputs)
    if kind in COMBINES:
        return None if any(item is None for item in inputs) else _merge(inputs)
    if kind is Kind.JOIN:
        traced = [item for item in inputs if item]
        return _merge(traced) if traced else None
    pointwise = kind is Kind.ACTIVATION or is_tagged_pointwise(node)
    if pointwise and len([item for item in inputs if item is None or item]) == 1 and first:
        return {key: _activated(flag, stem(node)) for key, flag in first.items()}
    return None


def _site(flow: Flow, node: fx.Node, softmaxes: dict[fx.Node, fx.Node]) -> Origin | None:
    """Add a site to `flow`. Returns its origin, empty if tracing ends there; None if the operator's own rule applies."""
    traits = traits_of(node)
    kind = traits.kind
    if kind is Kind.LINEAR and len(node.args) >= 2 and flow.weights[node.args[1]]:  # type: ignore[index]
        flow.linears.append(node)
        return {(node, None): ""}
    if kind is Kind.EXPERTS and flow.weights[node.args[1]]:  # type: ignore[index]
        flow.experts[node] = (node.args[0], node.args[1])  # type: ignore[assignment]
        return {(node, None): ""}
    if kind is Kind.NORM:
        flow.norms.append(node)
        return None
    if kind is Kind.EMBEDDING or (traits.lookup is Lookup.LIST and _is_table(flow, node)):
        flow.embeddings.append(node)
        return {}
    if kind is Kind.ATTENTION:
        q, k, v = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
        flow.cores.append(Core(node, q, k, v, mask, bool(causal)))  # type: ignore[arg-type]
        return {(node, None): ""}
    if kind is Kind.BATCHED_PRODUCT:
        return _product(flow, node, softmaxes)
    return None


def _product(flow: Flow, node: fx.Node, softmaxes: dict[fx.Node, fx.Node]) -> Origin:
    """Add a matrix product as a product of experts, or as a decomposed attention, if it is one."""
    left, right = _factors(node)
    for mine, other in ((left, right), (right, left)):
        stack = _experts(flow, mine)
        if stack is not None and not flow.weights[other]:
            flow.experts[node] = (other, stack)
            return {(node, None): ""}
    mixed = flow.origins[left]
    scores = next(
        (item for (item, _), flag in (mixed or {}).items() if flag == SOFTMAX and _is_product(item)),
        None,
    )
    if scores is not None:
        q, k = _factors(scores)
        flow.cores.append(Core(node, q, k, right, scores=scores, softmax=softmaxes[scores]))
    return {(node, None): ""}


def _is_product(node: fx.Node) -> bool:
    return traits_of(node).kind is Kind.BATCHED_PRODUCT


def _factors(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = (product.args[place] for place in traits_of(product).factors)
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return left, right


def _experts(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The stack of weights [experts, ...] if a node selects some of them by ids; layout operators are looked through."""
    while traits_of(node).dims is Dims.PERMUTED or traits_of(node).kind is Kind.CAST:
        node = node.args[0]  # type: ignore[assignment]
    if traits_of(node).dims not in (Dims.INDEX, Dims.INDEX_SELECT):
        return None
    table = node.args[0]
    if not isinstance(table, fx.Node) or not flow.weights[table] or table.meta["val"].dim() != 3:
        return None
    return table


def _is_table(flow: Flow, node: fx.Node) -> bool:
    """Whether a call looks up rows of a matrix of parameters."""
    table, indices = node.args[:2]
    if not isinstance(table, fx.Node) or table.op != "get_attr" or table.meta["val"].dim() != 2:
        return False
    if not table.meta["val"].is_floating_point() or not isinstance(indices, (list, tuple)):
        return False
    return len(indices) == 1 and isinstance(indices[0], fx.Node) and not flow.weights[indices[0]]


def _sum(inputs: list[Origin | None]) -> Origin | None:
    """Origin of a sum: a bias, and operators over one product, keep the origin; a residual sum has none.

    Scores plus a position bias keep the origin of the scores.
    """
    scores = [{key: flag for key, flag in item.items() if _is_product(key[0])} for item in inputs if item]
    if any(scores):
        return _merge([item for item in scores if item])
    if any(item is None for item in inputs):
        return None
    traced = [item for item in inputs if item]
    if len({frozenset(node for node, _ in item) for item in traced}) > 1:
        return None
    return _merge(traced)


def _merge(inputs: Any) -> Origin:
    """The union of origins; a product with different activations becomes COMPOSED."""
    merged: Origin = {}
    for item in inputs:
        for key, flag in (item or {}).items():
            before = merged.get(key)
            merged[key] = flag if before is None or before == flag else COMPOSED
    return merged


def _activated(flag: str, name: str) -> str:
    """The activation of a product after one more elementwise operator."""
    return name if flag in ("", name) else (SOFTMAX if flag == SOFTMAX else COMPOSED)
