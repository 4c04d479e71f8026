"""Attentions: what is mixed, from which outputs of which linears, how many heads, and what a query may see."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from bmgraph.analysis.structure.linears import linear_name, module_path, part_of
from bmgraph.analysis.structure.partial_evaluation import Region
from bmgraph.analysis.structure.sites import Attention, Part, Use
from bmgraph.analysis.structure.value_origins import Core, Flow, base, products, stem
from bmgraph.ir.program import Program

HIDDEN = -1e4
"""A score of at most this is hidden."""

DEEPEST = 8
"""How many projections and norms are looked through to see whether keys come from where queries do."""

Key = tuple[str, ...]


def find_attentions(program: Program, region: Region, flows: dict[str, Flow]) -> list[Attention]:
    """Every attention of all graphs; those of the same parameters are one site with several uses."""
    found: dict[Key, Attention] = {}
    for graph, flow in flows.items():
        exits = _exits(flow)
        causality: dict[fx.Node, bool | None] = {}
        for core in flow.cores:
            made = _attention(program, region, flow, core, exits.get(core.node), causality)
            parts = [part.linear if part else "" for part in (made.q, made.k, made.v)]
            key = (*parts, made.o or "") if any(parts) else (graph, core.node.name)
            before = found.get(key)
            use = Use(graph, core.node.name)
            found[key] = replace(before or made, uses=(*(before.uses if before else ()), use))
    return list(found.values())


def _exits(flow: Flow) -> dict[fx.Node, fx.Node]:
    """Attention -> the first linear after it."""
    exits: dict[fx.Node, fx.Node] = {}
    cores = {core.node for core in flow.cores}
    for linear in flow.linears:
        source = linear.args[0]
        assert isinstance(source, fx.Node)
        for node in products(flow.origins[source]):
            if node in cores:
                exits.setdefault(node, linear)
    return exits


def _attention(
    program: Program,
    region: Region,
    flow: Flow,
    core: Core,
    o: fx.Node | None,
    causality: dict[fx.Node, bool | None],
) -> Attention:
    linears = [_projection(flow, operand) for operand in (core.q, core.k, core.v)]
    distinct = {linear for linear in linears if linear is not None}
    whole = len(distinct) == len([linear for linear in linears if linear is not None])
    parts: list[Part | None] = []
    for linear, operand in zip(linears, (core.q, core.k, core.v)):
        cut = not whole or (operand is core.q and linear is not None and _is_cut(core.q, linear))
        parts.append(None if linear is None else part_of(program, region, linear, operand if cut else None))
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
        causal=_causal(region, core, causality),
        cross=_crosses(linears[0], linears[1]),
        uses=(),
    )


def _projection(flow: Flow, operand: fx.Node) -> fx.Node | None:
    """The linear that makes an operand; the first where there are several."""
    known = [node for node in products(flow.origins[operand]) if stem(node) == "linear"]
    return known[0] if known else None


def _is_cut(q: fx.Node, linear: fx.Node) -> bool:
    """Whether queries are fewer than the outputs of their linear (a gate may take the others)."""
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
    """Whether keys are made of something else than queries are."""
    if q is None or k is None or q is k:
        return False
    return not set(_upstream(q)) & set(_upstream(k))


def _upstream(linear: fx.Node) -> list[fx.Node]:
    """What a projection is made of, through norms and further projections."""
    chain: list[fx.Node] = []
    node = base(linear.args[0])
    while isinstance(node, fx.Node) and len(chain) < DEEPEST:
        chain.append(node)
        if node.op != "call_function" or stem(node) not in ("linear", "layer_norm", "rms_norm"):
            break
        node = base(node.args[0])
    return chain


def _causal(region: Region, core: Core, known: dict[fx.Node, bool | None]) -> bool | None:
    """Whether no query sees a later key: read from the mask, evaluated at a small size."""
    if core.is_causal:
        return True
    source = core.mask if core.scores is None else core.softmax.args[0]  # type: ignore[union-attr]
    if source is None:
        return False
    assert isinstance(source, fx.Node)
    if source not in known:
        leaves = {} if core.scores is None else {core.scores: region.leaf(core.scores)}
        with torch.no_grad():
            known[source] = _hides_later(region.value(source, leaves))
    return known[source]


def _hides_later(mask: torch.Tensor | None) -> bool | None:
    if mask is None or mask.dim() < 2:
        return None
    queries, keys = mask.shape[-2:]
    if queries > keys or keys < 2:
        return False
    visible = mask if mask.dtype == torch.bool else mask > HIDDEN
    later = torch.ones(queries, keys, dtype=torch.bool).triu(
        1 + keys - queries
    )  # behind a cache queries are the last
    return not bool((visible & later).any())
