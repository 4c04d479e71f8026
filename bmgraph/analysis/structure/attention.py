"""Finds attentions: their projections, number of heads, and whether they are causal or cross attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from bmgraph.analysis.structure.linears import linear_name, module_path, part_of
from bmgraph.analysis.structure.partial_evaluation import PartialEvaluator
from bmgraph.analysis.structure.sites import Attention, Part, Use
from bmgraph.analysis.structure.value_origins import Core, Flow, base, products
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import traits_of

HIDDEN = -1e4
"""A masked score is at most this."""

MAX_DEPTH = 8
"""How many projections and norms to follow upward when comparing the origin of keys and queries."""

Key = tuple[str, ...]
"""Identity of an attention: its parameters, or graph and node if it has none."""


def find_attentions(program: Program, evaluator: PartialEvaluator, flows: dict[str, Flow]) -> list[Attention]:
    """All attentions of all graphs; those that share parameters are one site with several uses."""
    found: dict[Key, Attention] = {}
    for graph, flow in flows.items():
        outputs = _output_linears(flow)
        causality: dict[fx.Node, bool | None] = {}
        for core in flow.cores:
            site = _attention(program, evaluator, flow, core, outputs.get(core.node), causality)
            parts = [part.linear if part else "" for part in (site.q, site.k, site.v)]
            key = (*parts, site.o or "") if any(parts) else (graph, core.node.name)
            previous = found.get(key)
            use = Use(graph, core.node.name)
            found[key] = replace(previous or site, uses=(*(previous.uses if previous else ()), use))
    return list(found.values())


def _output_linears(flow: Flow) -> dict[fx.Node, fx.Node]:
    """Attention -> the first linear after it."""
    outputs: dict[fx.Node, fx.Node] = {}
    cores = {core.node for core in flow.cores}
    for linear in flow.linears:
        source = linear.args[0]
        assert isinstance(source, fx.Node)
        for node in products(flow.origins[source]):
            if node in cores:
                outputs.setdefault(node, linear)
    return outputs


def _attention(
    program: Program,
    evaluator: PartialEvaluator,
    flow: Flow,
    core: Core,
    o: fx.Node | None,
    causality: dict[fx.Node, bool | None],
) -> Attention:
    """The site of one attention; `o` is the linear after it. `causality` caches what masks say."""
    linears = [_projection(flow, operand) for operand in (core.q, core.k, core.v)]
    distinct = {linear for linear in linears if linear is not None}
    separate = len(distinct) == len([linear for linear in linears if linear is not None])
    parts: list[Part | None] = []
    for linear, operand in zip(linears, (core.q, core.k, core.v)):
        partial = not separate or (operand is core.q and linear is not None and _reads_some(core.q, linear))
        parts.append(
            None if linear is None else part_of(program, evaluator, linear, operand if partial else None)
        )
    q, k, v = parts
    size = int(core.q.meta["val"].shape[-1])
    width = int(core.v.meta["val"].shape[-1])
    heads = q.size // size if q else _heads(core.q)
    kv_heads = k.size // size if k and k.size % size == 0 else (v.size // width if v else _heads(core.k))
    return Attention(
        path=_path(core, parts),
        q=q,
        k=k,
        v=v,
        o=linear_name(program, o) if o is not None else None,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        causal=_causal(evaluator, core, causality),
        cross=_crosses(linears[0], linears[1]),
        uses=(),
    )


def _projection(flow: Flow, operand: fx.Node) -> fx.Node | None:
    """The linear that computes an operand; the first if there are several."""
    known = [node for node in products(flow.origins[operand]) if traits_of(node).kind is Kind.LINEAR]
    return known[0] if known else None


def _reads_some(q: fx.Node, linear: fx.Node) -> bool:
    """Whether queries are only some outputs of their linear (a gate may use the others)."""
    shape = q.meta["val"].shape
    fixed = len(shape) == 4 and isinstance(shape[1], int) and isinstance(shape[3], int)
    return fixed and shape[1] * shape[3] != linear.meta["val"].shape[-1]


def _heads(operand: fx.Node) -> int:
    shape = operand.meta["val"].shape
    return int(shape[-3]) if len(shape) == 4 and isinstance(shape[-3], int) else 1


def _path(core: Core, parts: list[Part | None]) -> str:
    scope = core.node.meta.get("scope")
    if scope:
        return str(scope)
    return next((module_path(part.linear).rpartition(".")[0] for part in parts if part), "")


def _crosses(q: fx.Node | None, k: fx.Node | None) -> bool:
    """Whether keys and queries have no common origin."""
    if q is None or k is None or q is k:
        return False
    return not set(_upstream(q)) & set(_upstream(k))


def _upstream(linear: fx.Node) -> list[fx.Node]:
    """The values that a projection is computed from, through norms and further projections."""
    chain: list[fx.Node] = []
    node = base(linear.args[0])
    while isinstance(node, fx.Node) and len(chain) < MAX_DEPTH:
        chain.append(node)
        row = traits_of(node)
        if row.kind is not Kind.LINEAR and row.dims is not Dims.NORMED:
            break
        node = base(node.args[0])
    return chain


def _causal(evaluator: PartialEvaluator, core: Core, cache: dict[fx.Node, bool | None]) -> bool | None:
    """Whether no query sees a later key, by evaluating the mask at a small size; None if that fails."""
    if core.is_causal:
        return True
    source = core.mask if core.scores is None else core.softmax.args[0]  # type: ignore[union-attr]
    if source is None:
        return False
    assert isinstance(source, fx.Node)
    if source not in cache:
        leaves = {} if core.scores is None else {core.scores: evaluator.leaf(core.scores)}
        with torch.no_grad():
            cache[source] = _hides_later(evaluator.value(source, leaves))
    return cache[source]


def _hides_later(mask: torch.Tensor | None) -> bool | None:
    """Whether a mask [..., queries, keys] hides all later keys; None if it has no such shape."""
    if mask is None or mask.dim() < 2:
        return None
    queries, keys = mask.shape[-2:]
    if queries > keys or keys < 2:
        return False
    # With a KV cache the queries are the last positions.
    later = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return not bool((visible(mask) & later).any())


def visible(mask: torch.Tensor) -> torch.Tensor:
    """Which keys a mask lets queries see: a bool mask says so itself, and one that is added to scores unless it hides them."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN
