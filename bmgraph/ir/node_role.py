"""The parts that nodes play whose pass is not what the model computes by itself: they are told from its own by a stamp."""

from __future__ import annotations

import torch
from torch import fx

DELTA = "delta"
"""Part of the nodes that change what a linear gives; the last of them adds the change."""

PROMPT = "prompt"
"""Part of the nodes that put trained positions in front of those of an input."""

NEURONS = "neurons"
"""Part of the products with chosen experts that were neurons of one feed-forward."""

ROUTER = "router"
"""Part of the nodes that choose experts."""


def is_delta(node: fx.Node) -> bool:
    """Whether a node belongs to a delta."""
    return node.meta.get("part") == DELTA


def is_total(node: fx.Node) -> bool:
    """Whether a node adds the change of a delta to what a linear gives, its first argument."""
    return is_delta(node) and node.target is torch.ops.aten.add.Tensor
