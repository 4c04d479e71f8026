"""A small decoder as today's are: RMS norms, rotary positions, grouped heads, a gated feed-forward, in plain torch."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.models import enlarge

SIZE = 16
"""Size of a head."""


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Heads [B, n, S, SIZE], rotated by angles [B, S, SIZE / 2]."""
    twice = torch.cat([angles, angles], -1)
    low, high = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return x * twice.cos()[:, None] + torch.cat([-high, low], -1) * twice.sin()[:, None]


class RotaryLayer(nn.Module):
    """Attention of `heads` queries over `shared` keys and values, and a gated feed-forward."""

    def __init__(self, width: int, heads: int, shared: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q = nn.Linear(width, heads * SIZE, bias=bias)
        self.k, self.v = (nn.Linear(width, shared * SIZE, bias=bias) for _ in range(2))
        self.o = nn.Linear(heads * SIZE, width, bias=False)
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)
        self.first, self.second = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        q, k, v = (part(y).view(*y.shape[:2], -1, SIZE).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = turned(q, angles), turned(k, angles)
        k, v = (part.repeat_interleave(self.heads // self.shared, 1) for part in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.o(mixed.transpose(1, 2).reshape(*y.shape[:2], -1))
        y = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class RotaryDecoder(nn.Module):
    """Layers over 50 ids; `window`: how many keys before its own position a query sees (0: all)."""

    def __init__(
        self, width: int = 32, heads: int = 4, shared: int = 2, window: int = 0, bias: bool = False
    ) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(RotaryLayer(width, heads, shared, bias) for _ in range(2))
        self.norm, self.head = nn.RMSNorm(width, 1e-5), nn.Linear(width, 50, bias=False)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        frequencies = 10.0 ** -torch.arange(0, SIZE // 2).float()
        angles = (places[:, None] * frequencies)[None].expand(ids.shape[0], -1, -1)
        mask = (places[None, :] <= places[:, None]) & attention_mask.bool()[:, None, None, :]
        if self.window:
            mask = mask & (places[None, :] > places[:, None] - self.window)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles, mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def rotary_decoder(**options: int | bool) -> RotaryDecoder:
    """A RotaryDecoder with weights large enough that a mistake in any of them is visible."""
    torch.manual_seed(0)
    model = RotaryDecoder(**options).eval()  # type: ignore[arg-type]
    enlarge(model)
    return model
