"""Roles of nodes that passes added to the model, kept under the metadata key `part`."""

from __future__ import annotations

import torch
from torch import fx

DELTA = "delta"
"""Nodes that compute the delta of a linear's output; the last of them adds it."""

PROMPT = "prompt"
"""Nodes that put trained positions in front of an input's own."""

NEURONS = "neurons"
"""Products with the weights of selected experts that were split from the neurons of one feed-forward."""

ROUTER = "router"
"""Nodes that select experts."""


def is_delta(node: fx.Node) -> bool:
    """Whether a node belongs to a delta."""
    return node.meta.get("part") == DELTA


def adds_delta(node: fx.Node) -> bool:
    """Whether a node adds a delta to a linear's output, which is its first argument."""
    return is_delta(node) and node.target is torch.ops.aten.add.Tensor
