"""Dropout that draws once for many elements: stochastic depth (Huang et al. 2016) draws once a row."""

from __future__ import annotations

from typing import Any

import torch

from bmgraph.ops.trait_row import Dims, Kind, Traits

torch.library.define(
    "bmgraph::dropout_along",
    "(Tensor x, float p, bool train, int[] dims) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def dropout_along(x: torch.Tensor, p: float, train: bool, dims: list[int]) -> torch.Tensor:
    """x f[...] -> f[...]: in training, zeros with probability `p`, and x / (1 - p) else.

    Each index of the dimensions `dims` draws once, for all elements that it has in the others: `[0]` draws once a row,
    `[]` once for the whole tensor. Not in training, x itself.
    """
    if not train:
        return x.clone()
    sizes = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
    return x * torch.dropout(x.new_ones(sizes), p, True)


torch.library.impl("bmgraph::dropout_along", "CompositeImplicitAutograd", dropout_along)

TRAITS: dict[Any, Traits] = {
    torch.ops.bmgraph.dropout_along: Traits(Kind.DROPOUT, Dims.ELEMENTWISE, train="train", drop="p"),
}
"""The rows of these operators."""
