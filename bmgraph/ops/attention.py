"""Attention on packed rows, as inference kernels take it: heads are split inside."""

from __future__ import annotations

import torch


@torch.library.custom_op("bmgraph::multi_head_attention", mutates_args=())
def multi_head_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    """query f[B, S, H*d], key f[B, T, H*d], value f[B, T, H*e], padding [B, T] (0: hidden) or none -> f[B, S, H*e]."""
    batch, length = query.shape[:2]
    q, k, v = (item.reshape(*item.shape[:2], heads, -1).transpose(1, 2) for item in (query, key, value))
    mask = None
    if padding is not None:
        mask = (padding != 0)[:, None, None, :]
    if causal:
        lower = torch.ones(length, k.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = lower if mask is None else mask & lower
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return mixed.transpose(1, 2).reshape(batch, length, -1)


@multi_head_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])
