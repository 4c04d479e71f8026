"""Prepare a decoder for a cache that is written in place: sizes come from another input, and attention that reads no later key is marked.

B rows, P cached positions, S new ones. A cache in place is longer than the positions in it, so its own size says nothing of P: that of the
mask [B, P + S] does, or that of an input [1, P + S] which is added where there is no mask.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.attention_mask import evaluate_on
from bmgraph.analysis.structure.attention import visible
from bmgraph.backends.onnx.rewrites.cache_attention import Read
from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.shape_inference import expression
from bmgraph.ir.symbolic_dim import size_of
from bmgraph.ir.tensor_spec import Dim, TensorSpec

aten = torch.ops.aten

CAUSAL = "causal"
"""Key of the metadata of an attention whose mask hides every key after the query's own position: a `Read`, as text."""

EXTENT = "all_positions"
"""The name of the input whose size is that of all positions."""

SIZES = ((0, 6), (5, 4), (9, 1))
"""Cached and new positions at which masks are evaluated."""

ROWS, OTHER = 3, 2
"""The rows at which masks are evaluated, and any other size."""


def prepare_cache_reads(program: Program) -> int:
    """Mark attention over the cache that reads no later key, and take the number of cached positions from another input, in place;
    returns how many attentions were marked. Where that is none, the program stays as it is."""
    layout = program.cache
    if layout is None or not _may_be_larger(program, layout):
        return 0
    read: dict[fx.Node, Read | None] = {}
    marked = []
    for node in program.graph.nodes:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        if mask not in read:
            read[mask] = _read(program, layout, mask)
        if read[mask] is not None:
            marked.append((node, read[mask]))
    if not marked:
        return 0
    carrier = _take_sizes(program, layout)
    for node, found in marked:
        node.meta[CAUSAL] = ":".join([str(found), carrier, *([layout.positions] if layout.positions else [])])
    return len(marked)


def _may_be_larger(program: Program, layout: CacheLayout) -> bool:
    """Whether B, P and S are free, and a mask has P + S positions."""
    inputs, names = placeholders(program.graph), _size_names(program, layout)
    if names is None or any(spec.name == EXTENT for spec in program.inputs):
        return False
    new = expression(inputs[layout.tokens].meta["val"].shape[1])
    totals = {expression(inputs[slot.past].meta["val"].shape[slot.axis]) + new for slot in layout.slots}
    if layout.mask is not None:
        totals.add(expression(inputs[layout.mask].meta["val"].shape[1]))
    return len(totals) == 1


def _take_sizes(program: Program, layout: CacheLayout) -> str:
    """Read the size P of every slot as that of all positions without the new ones; returns the name of the input that has the former."""
    inputs = placeholders(program.graph)
    tokens = inputs[layout.tokens]
    pasts = {inputs[slot.past]: slot.axis for slot in layout.slots}
    reads = [
        node
        for node in program.graph.nodes
        if node.target is aten.sym_size.int and pasts.get(node.args[0]) == node.args[1]
    ]
    with program.edit() as editor:
        if layout.mask is not None:
            carrier = inputs[layout.mask]
        else:
            past, axis = next(iter(pasts.items()))
            total = past.meta["val"].shape[axis] + tokens.meta["val"].shape[1]
            slot, names = layout.slots[0], layout.tokens
            held = program.example[slot.past].shape[axis] + program.example[names].shape[1]
            carrier = editor.input(
                EXTENT, torch.zeros(1, held, dtype=torch.uint8), (1, total), kind=InputKind.CACHE
            )
            program.cache = replace(layout, extent=EXTENT)
        for node in reads:
            sizes = [editor.call(aten.sym_size.int, source, 1, like=node) for source in (carrier, tokens)]
            editor.replace(node, editor.call(operator.sub, *sizes, like=node))
    return str(carrier.target)


def _read(program: Program, layout: CacheLayout, mask: fx.Node) -> Read | None:
    """What a mask [..., S, P + S] hides beside every key after the query's own position, evaluated at several sizes and paddings; None
    where it shows such a key."""
    own = {str(node.target) for node in upstream(mask) if node.op == "placeholder"}
    inputs = [spec for spec in program.inputs if spec.name in own]
    names = _size_names(program, layout)
    assert names is not None
    left = {Read.NOTHING, Read.PADDING} if mask.meta["val"].dtype == torch.bool else set[Read]()
    for cached, new in SIZES:
        known = dict(zip(names, (ROWS, cached, new)))
        for padding in _paddings(cached + new):
            batch = {
                spec.name: _value(spec, known, padding if spec.name == layout.mask else None)
                for spec in inputs
            }
            try:
                seen = visible(evaluate_on(program, mask, batch))
            except (RuntimeError, IndexError, KeyError, ValueError):
                return None
            if seen.dim() < 2 or tuple(seen.shape[-2:]) != (new, cached + new):
                return None
            earlier = torch.ones(new, cached + new, dtype=torch.bool).tril(cached)
            if bool((seen & ~earlier).any()):
                return None
            if not bool((seen == earlier).all()):
                left.discard(Read.NOTHING)
            if not bool((seen == earlier & padding.bool()[:, None, None]).all()):
                left.discard(Read.PADDING)
    return left.pop() if len(left) == 1 else Read.ANYTHING


def _size_names(program: Program, layout: CacheLayout) -> tuple[str, str, str] | None:
    """The names of B, P and S; None where one of them is fixed."""
    specs = {spec.name: spec for spec in program.inputs}
    rows, new = specs[layout.tokens].shape
    slot = layout.slots[0]
    found: tuple[Dim, ...] = (rows, specs[slot.past].shape[slot.axis], new)
    return None if any(isinstance(dim, int) for dim in found) else tuple(map(str, found))  # type: ignore[return-value]


def _paddings(length: int) -> Iterator[torch.Tensor]:
    """Masks of ROWS rows: no padding, padding in front, and holes."""
    yield torch.ones(ROWS, length)
    yield (torch.arange(length)[None] >= torch.arange(ROWS)[:, None]).float()
    holes = torch.ones(ROWS, length)
    holes[:, 2::3] = 0
    yield holes


def _value(spec: TensorSpec, sizes: dict[str, int], padding: torch.Tensor | None) -> torch.Tensor:
    if padding is not None:
        return padding.to(spec.dtype)
    shape = [size if (size := size_of(dim, sizes)) is not None else OTHER for dim in spec.shape]
    return torch.zeros(shape, dtype=spec.dtype)
