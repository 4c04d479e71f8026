"""Where values come from: one walk over a graph tells for every node which products it is made of, up to layout,
scaling and activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.ir.node_role import adds_delta, is_delta

aten = torch.ops.aten

SIZES = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)

Source = tuple[fx.Node, fx.Node | None]
"""A product, and the call that took a part of its output first, if one did."""

Origin = dict[Source, str]
"""The products that a value is made of -> the activation that each went through ("" for none). Empty: made of
parameters, positions and masks alone."""

SOFTMAX = "softmax"
COMPOSED = "composed"
"""An activation written out in several operators."""

LARGEST = 12
"""A value made of more sources than this is of no interest to a pattern."""

DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout"})
ROUNDINGS = frozenset({"quantize_static", "quantize_dynamic", "quantize_blocks"})
CASTS = frozenset({"to", "_to_copy", "type_as"})
MOVES = frozenset(
    {
        "reshape", "view", "transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "flatten", "unflatten",
        "repeat", "repeat_interleave", "contiguous", "clone", "pad", "constant_pad_nd", "roll", "neg", "flip",
    }
)  # fmt: skip
CUTS = frozenset({"chunk", "split", "split_with_sizes", "unbind", "tensor_split"})
"""Calls that return several parts."""
TAKES = frozenset({"slice", "select", "index", "narrow", "gather", "index_select"})
"""Calls that return one part."""
NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm"})
SOFTMAXES = frozenset({"softmax", "_softmax", "_safe_softmax"})
PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
EXPERTS = "experts_linear"
"""The product with the weights of experts that ids choose."""
SUMS = frozenset({"add", "sub"})
SCALINGS = frozenset({"mul", "div"})
CHOICES = frozenset({"masked_fill", "where"})
JOINS = frozenset({"cat", "stack"})
ATTENTIONS = frozenset({"scaled_dot_product_attention"})
TRANSPARENT = DROPOUTS | ROUNDINGS | CASTS | frozenset({"reshape", "contiguous", "clone", "view"})
"""What is looked through when two inputs are compared."""


def stem(node: fx.Node) -> str:
    """The operator's name without namespace and overload; "getitem", ... for Python's own."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "")


@dataclass
class Core:
    """One attention: the operands that it mixes. `scores` is the product of queries and keys where it is written
    out (then `softmax` is what normalises it); `mask` is what a fused operator was given."""

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
    """What the walk found in one graph."""

    graph: fx.Graph
    origins: dict[fx.Node, Origin | None] = field(default_factory=dict)
    """None where a value is made of something else than products: embeddings, residual sums, convolutions."""
    weights: dict[fx.Node, bool] = field(default_factory=dict)
    """Nodes that are made of parameters and buffers alone."""
    linears: list[fx.Node] = field(default_factory=list)
    experts: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    """Product with a chosen expert's weight -> (its input, the expression of all experts' weights)."""
    cores: list[Core] = field(default_factory=list)
    embeddings: list[fx.Node] = field(default_factory=list)
    norms: list[fx.Node] = field(default_factory=list)


def walk(graph: fx.Graph) -> Flow:
    """One pass over the nodes, in order; the cost is linear in their number."""
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
        flow.origins[node] = found if found is None or len(found) <= LARGEST else None
    return flow


def base(node: Any) -> Any:
    """The value behind dropout, casts, rounding, reshapes and deltas."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if not (adds_delta(node) or stem(node) in TRANSPARENT):
            break
        node = node.args[0]
    return node


def products(origin: Origin | None) -> list[fx.Node]:
    """The products of an origin, each once, in order."""
    return list(dict.fromkeys(node for node, _ in origin)) if origin else []


def _origin(flow: Flow, node: fx.Node, softmaxes: dict[fx.Node, fx.Node]) -> Origin | None:
    if node.op == "placeholder":
        value = node.meta.get("val")
        return None if isinstance(value, torch.Tensor) and value.is_floating_point() else {}
    if node.op != "call_function" or isinstance(node.meta.get("val"), SIZES):
        return {}
    if is_delta(node):
        return flow.origins[node.args[0]] if adds_delta(node) else None  # type: ignore[index]
    name = stem(node)
    special = _site(flow, node, name, softmaxes)
    if special is not None:
        return special or None
    inputs = [flow.origins[item] for item in node.all_input_nodes]
    if all(item is not None and not item for item in inputs):
        return {}
    first = flow.origins.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else {}
    if (
        name in MOVES
        or name in DROPOUTS
        or name in CASTS
        or name in ROUNDINGS
        or name in CUTS
        or name in NORMS
    ):
        return first
    if name in TAKES or name == "getitem":
        return (
            None if first is None else {(item, taken or node): flag for (item, taken), flag in first.items()}
        )
    if name in SOFTMAXES:
        for item in products(first):
            softmaxes.setdefault(item, node)
        return None if first is None else dict.fromkeys(first, SOFTMAX)
    if name in SUMS:
        return _sum(inputs)
    if name in SCALINGS or name in CHOICES:
        return None if any(item is None for item in inputs) else _merge(inputs)
    if name in JOINS:
        known = [item for item in inputs if item]
        return _merge(known) if known else None
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if pointwise and len([item for item in inputs if item is None or item]) == 1 and first:
        return {key: _activated(flag, name) for key, flag in first.items()}
    return None


def _site(flow: Flow, node: fx.Node, name: str, softmaxes: dict[fx.Node, fx.Node]) -> Origin | None:
    """Note a site; returns its origin, an empty one for a site that ends all tracing, None for no site."""
    if name == "linear" and len(node.args) >= 2 and flow.weights[node.args[1]]:  # type: ignore[index]
        flow.linears.append(node)
        return {(node, None): ""}
    if name == EXPERTS and flow.weights[node.args[1]]:  # type: ignore[index]
        flow.experts[node] = (node.args[0], node.args[1])  # type: ignore[assignment]
        return {(node, None): ""}
    if name in NORMS:
        flow.norms.append(node)
        return None
    if name == "embedding" or (name == "index" and _is_table(flow, node)):
        flow.embeddings.append(node)
        return {}
    if name in ATTENTIONS:
        q, k, v = node.args[:3]
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
        flow.cores.append(Core(node, q, k, v, mask, bool(causal)))  # type: ignore[arg-type]
        return {(node, None): ""}
    if name in PRODUCTS:
        return _product(flow, node, name, softmaxes)
    return None


def _product(flow: Flow, node: fx.Node, name: str, softmaxes: dict[fx.Node, fx.Node]) -> Origin:
    left, right = node.args[1:3] if name == "baddbmm" else node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    for mine, other in ((left, right), (right, left)):
        stack = _experts(flow, mine)
        if stack is not None and not flow.weights[other]:
            flow.experts[node] = (other, stack)
            return {(node, None): ""}
    mixed = flow.origins[left]
    scores = next(
        (item for (item, _), flag in (mixed or {}).items() if flag == SOFTMAX and stem(item) in PRODUCTS),
        None,
    )
    if scores is not None:
        q, k = scores.args[1:3] if stem(scores) == "baddbmm" else scores.args[:2]
        flow.cores.append(Core(node, q, k, right, scores=scores, softmax=softmaxes[scores]))  # type: ignore[arg-type]
    return {(node, None): ""}


def _experts(flow: Flow, node: fx.Node) -> fx.Node | None:
    """All experts' weights where a node picks some of them by ids; layout between is looked through."""
    while node.op == "call_function" and stem(node) in ("transpose", "permute", "to"):
        node = node.args[0]  # type: ignore[assignment]
    if node.op != "call_function" or stem(node) not in ("index", "index_select"):
        return None
    table = node.args[0]
    if not isinstance(table, fx.Node) or not flow.weights[table] or table.meta["val"].dim() != 3:
        return None
    return table


def _is_table(flow: Flow, node: fx.Node) -> bool:
    """Whether a call looks up rows of a matrix of parameters."""
    table, places = node.args[:2]
    if not isinstance(table, fx.Node) or table.op != "get_attr" or table.meta["val"].dim() != 2:
        return False
    if not table.meta["val"].is_floating_point() or not isinstance(places, (list, tuple)):
        return False
    return len(places) == 1 and isinstance(places[0], fx.Node) and not flow.weights[places[0]]


def _sum(inputs: list[Origin | None]) -> Origin | None:
    """A bias passes, as does what is written out over one product; a residual sum does not."""
    scores = [
        {key: flag for key, flag in item.items() if stem(key[0]) in PRODUCTS} for item in inputs if item
    ]
    if any(scores):
        return _merge([item for item in scores if item])
    if any(item is None for item in inputs):
        return None
    known = [item for item in inputs if item]
    if len({frozenset(node for node, _ in item) for item in known if item}) > 1:
        return None
    return _merge(known)


def _merge(inputs: Any) -> Origin:
    merged: Origin = {}
    for item in inputs:
        for key, flag in (item or {}).items():
            before = merged.get(key)
            merged[key] = flag if before is None or before == flag else COMPOSED
    return merged


def _activated(flag: str, name: str) -> str:
    return name if flag in ("", name) else (SOFTMAX if flag == SOFTMAX else COMPOSED)
