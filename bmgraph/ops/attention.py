"""Multi-head attention whose inputs hold all heads in one axis, as inference kernels expect them."""

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
    blind: float | None = None,
) -> torch.Tensor:
    """query f[B, S, H*d], key f[B, T, H*d], value f[B, T, H*e], padding [B, T] (0: masked) or None -> f[B, S, H*e].

    B batch, S queries, T keys, H `heads`. `causal` lets query i see keys 0 to i, and S is T. A query that sees no key
    gets 0; with `blind`, that number is added to every score that is hidden, which gives the query a mean of values.
    """
    batch, length = query.shape[:2]
    q, k, v = (item.reshape(*item.shape[:2], heads, -1).transpose(1, 2) for item in (query, key, value))
    mask = None
    if padding is not None:
        mask = (padding != 0)[:, None, None, :]
    if causal:
        visible = torch.ones(length, k.shape[2], dtype=torch.bool, device=query.device).tril()
        mask = visible if mask is None else mask & visible
    if mask is not None and blind is not None:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, blind)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return attended.transpose(1, 2).reshape(batch, length, -1)


@multi_head_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    heads: int,
    scale: float,
    causal: bool,
    blind: float | None = None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], value.shape[2])
