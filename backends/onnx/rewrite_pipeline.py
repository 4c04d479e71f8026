"""The table of ONNX rewrites, and the loop that applies them in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from bmgraph.backends.onnx.rewrites.branch_by_rows import branch_by_rows
from bmgraph.backends.onnx.rewrites.contrib_gelu import use_fast_gelu
from bmgraph.backends.onnx.rewrites.drop_clip import drop_clips
from bmgraph.backends.onnx.rewrites.fuse_integer_matmul import fuse_integer_products
from bmgraph.backends.onnx.rewrites.fuse_rotary import use_rotary
from bmgraph.backends.onnx.rewrites.gather_to_matmul import pick_by_product
from bmgraph.backends.onnx.rewrites.graph_utils import remove_dead
from bmgraph.backends.onnx.rewrites.keep_expert_order import keep_expert_order
from bmgraph.backends.onnx.rewrites.merge_products import merge_products
from bmgraph.backends.onnx.rewrites.padding_as_feature import fold_padding
from bmgraph.backends.onnx.rewrites.quantize_before_concat import round_before_concat
from bmgraph.backends.onnx.rewrites.share_kv_heads import share_heads
from bmgraph.backends.onnx.rewrites.shared_cache import append_in_place

REWRITES: tuple[tuple[str, Callable[[ir.Model], int]], ...] = (
    ("round_before_concat", round_before_concat),
    ("drop_clips", drop_clips),
    ("fuse_integer_products", fuse_integer_products),
    ("use_fast_gelu", use_fast_gelu),
    ("fold_padding", fold_padding),
    ("pick_by_product", pick_by_product),
    ("share_heads", share_heads),
    ("use_rotary", use_rotary),
    ("append_in_place", append_in_place),
    ("merge_products", merge_products),
    ("keep_expert_order", keep_expert_order),
    ("branch_by_rows", branch_by_rows),
)
"""Name and function of each rewrite; a function edits the model in place and returns how many matches it rewrote."""


@dataclass(frozen=True)
class Rewritten:
    """A rewrite that matched, and how many times."""

    name: str
    count: int


def optimise(model: ir.Model) -> list[Rewritten]:
    """Rewrite a model in place to the operators that ONNX Runtime runs fastest; returns the rewrites that matched."""
    applied = []
    for name, rewrite in REWRITES:
        count = rewrite(model)
        remove_dead(model.graph)
        if count:
            applied.append(Rewritten(name, count))
    return applied
