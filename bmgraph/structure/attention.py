"""Attentions: the attention node, the projections that feed it and the one that reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.masks import reads_causal
from bmgraph.program import Program
from bmgraph.structure.sites import Attention, Part
from bmgraph.structure.trace import (
    ARITHMETIC,
    NORMS,
    QUIET,
    SHAPES,
    downwards,
    getitem,
    is_linear,
    source_of,
    upwards,
)

aten = torch.ops.aten

BETWEEN = QUIET | ARITHMETIC | NORMS
"""What may stand between a projection and the attention: rotary embeddings, norms of q and k, scales."""


def find_attentions(program: Program, sites: dict[fx.Node, str]) -> tuple[Attention, ...]:
    """Every attention, once for each set of projections, however often it is used."""
    found: dict[tuple[Part, Part, Part], Attention] = {}
    causal: dict[Any, bool] = {}
    for node in program.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            item = _read(program, node, sites, causal)
            if item is not None:
                found.setdefault((item.q, item.k, item.v), item)
    return tuple(found.values())


def _read(
    program: Program, node: fx.Node, sites: dict[fx.Node, str], known: dict[Any, bool]
) -> Attention | None:
    projections = [_projection(argument, sites) for argument in node.args[:3]]
    if any(item is None for item in projections):
        return None
    (q, passed_q), (k, passed_k), (v, passed_v) = projections  # type: ignore[misc]
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    size = int(value.shape[-1])
    v_size = int(node.args[2].meta["val"].shape[-1])  # type: ignore[union-attr]
    shared = len({q, k, v}) == 1
    width = int(q.meta["val"].shape[-1])
    if value.dim() == 4 and isinstance(value.shape[1], int):
        heads = int(value.shape[1])
    else:
        heads = (width // 3 if shared else width) // size
    if shared:
        kv_heads = (width - heads * size) // (size + v_size)
    else:
        kv_heads = max(1, int(k.meta["val"].shape[-1]) // (size + v_size if k is v else size))
    output = next(downwards(node, QUIET | ARITHMETIC | NORMS, is_linear), None)
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask not in known:
        known[mask] = isinstance(mask, fx.Node) and reads_causal(program, mask)
    is_causal = known[mask] or bool(
        node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    )
    return Attention(
        path=str(node.meta.get("scope", "")), node=node.name,
        q=_part(sites[q], q, passed_q), k=_part(sites[k], k, passed_k), v=_part(sites[v], v, passed_v),
        o=sites.get(output, "") if output is not None else "", heads=heads, kv_heads=kv_heads, head_size=size,
        causal=is_causal, cross=source_of(q) is not source_of(k),
    )  # fmt: skip


def _projection(argument: Any, sites: dict[fx.Node, str]) -> tuple[fx.Node, list[fx.Node]] | None:
    walk = upwards(argument, BETWEEN, is_linear)
    found = [node for node in walk.found if node in sites]
    return (found[0], walk.passed) if found else None


def _part(site: str, linear: fx.Node, passed: list[fx.Node]) -> Part:
    """The range of a projection's outputs that is read, where it is cut out by one split, chunk or slice."""
    width = int(linear.meta["val"].shape[-1])
    between = set(passed)
    reader = linear
    while True:
        users = [user for user in reader.users if user in between]
        if len(users) != 1:
            return (site, None, None)
        user = users[0]
        if getitem(user):
            return _piece(site, user, width)
        value = user.meta.get("val")
        if (
            user.target is aten.slice.Tensor
            and isinstance(value, torch.Tensor)
            and user.args[1] in (value.dim() - 1, -1)
        ):
            start = int(user.args[2] or 0) if len(user.args) > 2 else 0  # type: ignore[arg-type,call-overload]
            return (site, start, start + int(value.shape[-1]))
        if user.target not in SHAPES or (isinstance(value, torch.Tensor) and value.shape[-1] != width):
            return (site, None, None)
        reader = user


def _piece(site: str, item: fx.Node, width: int) -> Part:
    pieces = item.args[0].meta["val"]  # type: ignore[union-attr]
    index = item.args[1]
    assert isinstance(index, int)
    sizes = [int(piece.shape[-1]) for piece in pieces]
    if sum(sizes) != width:
        return (site, None, None)
    start = sum(sizes[:index])
    return (site, start, start + sizes[index])
