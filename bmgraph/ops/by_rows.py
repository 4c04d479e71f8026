"""Two forms of one computation, of which the number of rows decides: one is fast for few, the other for many."""

from __future__ import annotations

import torch


@torch.library.custom_op("bmgraph::by_rows", mutates_args=())
def by_rows(few: torch.Tensor, many: torch.Tensor, x: torch.Tensor, limit: int) -> torch.Tensor:
    """`few` where x has at most `limit` elements (rows times their length), else `many`; both have the same shape.

    A backend computes only the one that it gives.
    """
    return (few if x.numel() <= limit else many).clone()


@by_rows.register_fake
def _(few: torch.Tensor, many: torch.Tensor, x: torch.Tensor, limit: int) -> torch.Tensor:
    return torch.empty_like(many)
