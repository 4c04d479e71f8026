"""What attentions compare: their scores, and how the queries, keys or values of the positions relate to each other.

Shapes: B batch, H heads, S queries, T keys, D features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.attention import HIDDEN
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims, shape, value
from bmgraph.ops.traits import argument

aten = torch.ops.aten

QUERIES, KEYS, VALUES = "queries", "keys", "values"
"""Between what of the positions relations are."""

LayerCores = tuple[tuple[tuple[Core, ...], ...], ...]
"""For each stack and each of its layers the attentions in it, in order."""


def layer_attentions(program: Program) -> LayerCores:
    """The attentions of each layer; those of a layer that runs several times are left out."""
    structure = find(program)
    cores = {core.node.name: core for core in walk(program.graph).cores}
    by_site: dict[str, Core] = {}
    for item in structure.attentions:
        used = [cores[use.node] for use in item.uses if use.graph == program.entry and use.node in cores]
        parts = [part.linear for part in (item.q, item.k, item.v) if part is not None]
        site = item.o or next(iter(parts), None)
        if site is not None and len(used) == 1:
            by_site[site] = used[0]
    return tuple(
        tuple(tuple(by_site[site] for site in layer.sites if site in by_site) for layer in stack.layers)
        for stack in structure.stacks
    )


def in_copy(core: Core, nodes: Mapping[str, fx.Node]) -> Core:
    """The same attention in a copy of its program, given the nodes of that by name."""
    held: dict[str, Any] = {field.name: getattr(core, field.name) for field in fields(core)}
    moved: dict[str, Any] = {
        name: nodes[item.name] if isinstance(item, fx.Node) else item for name, item in held.items()
    }
    return Core(**moved)


def has_heads(core: Core) -> bool:
    """Whether its operands are [B, H, S, D]: else batch and heads cannot be told apart."""
    return all(value(item).dim() == 4 for item in (core.q, core.k, core.v))


def head_count(core: Core) -> int:
    """The number of heads of queries."""
    return int(shape(core.q)[1])


def is_self_attention(program: Program, core: Core) -> bool:
    """Whether its queries and keys are those of the same positions, by their sizes."""
    keys = dims(program, value(core.k))
    return dims(program, value(core.q))[2] == (keys[2] if core.scores is None else keys[3])


def attention_scores(editor: Editor, core: Core) -> fx.Node:
    """The scores f[B, H, S, T] before softmax, scaled and masked as the model does; what is hidden is HIDDEN, not infinite."""
    like = output_node(editor.graph)
    if core.softmax is not None:
        scores = core.softmax.args[0]
        assert isinstance(scores, fx.Node)
    else:
        scores = _fused_scores(editor, core, like)
    return editor.call(aten.clamp_min.default, scores, HIDDEN, like=like)


def relation_scores(editor: Editor, core: Core, what: str, heads: int) -> fx.Node:
    """The scores f[B, heads, S, S] of positions with each other: products of their queries (or keys, or values), of all
    heads together cut into `heads` equal parts, by the square root of a part's size; hidden where the attention hides.

    Source: Wang et al. 2021 (arXiv:2012.15828).
    """
    like = output_node(editor.graph)
    source = {QUERIES: core.q, KEYS: core.k, VALUES: core.v}[what]
    if what == KEYS and core.scores is not None:  # the second factor of the scores
        source = editor.call(aten.transpose.int, source, -2, -1, like=like)
    size = relation_size(core, what) // heads
    by_position = editor.call(aten.transpose.int, source, 1, 2, like=like)
    rows, length = (
        item if isinstance(item, int) else editor.call(aten.sym_size.int, by_position, axis, like=like)
        for axis, item in enumerate(shape(by_position)[:2])
    )
    parts = editor.call(aten.reshape.default, by_position, [rows, length, heads, size], like=like)
    parts = editor.call(aten.transpose.int, parts, 1, 2, like=like)
    other = editor.call(aten.transpose.int, parts, -2, -1, like=like)
    scaled = editor.call(aten.mul.Tensor, parts, size**-0.5, like=like)
    scores = editor.call(aten.matmul.default, scaled, other, like=like)
    highest = editor.call(aten.amax.default, attention_scores(editor, core), [1], True, like=like)
    hidden = editor.call(aten.le.Scalar, highest, HIDDEN / 2, like=like)
    masked = editor.call(aten.masked_fill.Scalar, scores, hidden, HIDDEN, like=like)
    return editor.call(aten.clamp_min.default, masked, HIDDEN, like=like)


def relation_size(core: Core, what: str) -> int:
    """The number of features of all heads together."""
    sizes = shape({QUERIES: core.q, KEYS: core.k, VALUES: core.v}[what])
    return int(sizes[1]) * int(sizes[2 if what == KEYS and core.scores is not None else 3])


def _fused_scores(editor: Editor, core: Core, like: fx.Node) -> fx.Node:
    """The scores of a fused attention."""
    keys = core.k
    if argument(core.node, "enable_gqa", False):
        times = int(shape(core.q)[1]) // int(shape(keys)[1])
        keys = editor.call(aten.repeat_interleave.self_int, keys, times, 1, like=like)
    scale = argument(core.node, "scale", None)
    factor = int(shape(core.q)[-1]) ** -0.5 if scale is None else scale
    scaled = editor.call(aten.mul.Tensor, core.q, factor, like=like)
    turned = editor.call(aten.transpose.int, keys, -2, -1, like=like)
    scores = editor.call(aten.matmul.default, scaled, turned, like=like)
    if core.is_causal:
        ones = editor.call(aten.ones_like.default, scores, dtype=torch.bool, like=like)
        later = editor.call(aten.triu.default, ones, 1, like=like)
        scores = editor.call(aten.masked_fill.Scalar, scores, later, HIDDEN, like=like)
    if core.mask is None:
        return scores
    if value(core.mask).dtype == torch.bool:
        hidden = editor.call(aten.logical_not.default, core.mask, like=like)
        return editor.call(aten.masked_fill.Scalar, scores, hidden, HIDDEN, like=like)
    return editor.call(aten.add.Tensor, scores, core.mask, like=like)
