"""A small decoder with grouped-query attention, rotary embeddings, RMS norms, gates and a tied head, in plain torch.

All sizes but that of a head are read from the weights, so that a model whose weights are sliced by hand is a reference for one that
a pass made smaller.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTH, HEADS, GROUPS, SIZE, FEATURES, VOCABULARY = 32, 4, 2, 8, 48, 50


class Norm(nn.Module):
    """RMS norm over the features that are there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x f[..., D] -> f[..., D]."""
        return functional.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def rotated(x: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x f[B, H, S, D] rotated by angles f[1, 1, S, D / 2], in pairs (i, i + D / 2), or (2 i, 2 i + 1) where these are interleaved."""
    if interleaved:
        first, second = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-second, first), -1).flatten(-2)
        wide = angles.repeat_interleave(2, -1)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        wide = torch.cat((angles, angles), -1)
    return x * wide.cos() + turned * wide.sin()


class Layer(nn.Module):
    """A pre-norm layer."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.interleaved = interleaved
        self.first, self.second = Norm(WIDTH), Norm(WIDTH)
        self.q, self.o = (
            nn.Linear(WIDTH, HEADS * SIZE, bias=False),
            nn.Linear(HEADS * SIZE, WIDTH, bias=False),
        )
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * SIZE) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, FEATURES, bias=False) for _ in range(2))
        self.down = nn.Linear(FEATURES, WIDTH, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x f[B, S, W], angles f[1, 1, S, D / 2], mask bool[B, 1, S, S] -> f[B, S, W]."""
        read = self.first(x)
        q, k, v = (p(read).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = (rotated(item, angles, self.interleaved) for item in (q, k))
        k, v = (item.repeat_interleave(HEADS // GROUPS, 1) for item in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = x + self.drop(self.o(mixed))
        read = self.second(x)
        return x + self.drop(self.down(functional.silu(self.gate(read)) * self.up(read)))


class GroupedDecoder(nn.Module):
    """Layers over token ids; with labels, the loss of the next token too."""

    def __init__(self, layers: int = 3, interleaved: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer(interleaved) for _ in range(layers))
        self.norm = Norm(WIDTH)
        self.register_buffer(
            "frequencies", 100.0 ** -(torch.arange(SIZE // 2) / (SIZE // 2)), persistent=False
        )

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """ids, attention_mask, labels i64[B, S] -> logits f[B, S, V], loss f[]."""
        places = torch.arange(ids.shape[1])
        angles = (places[:, None] * self.frequencies)[None, None]
        mask = (places[None, :] <= places[:, None]) & attention_mask.bool()[:, None, None, :]
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles, mask)
        logits = functional.linear(self.norm(x), self.embed.weight)
        if labels is None:
            return {"logits": logits}
        return {
            "logits": logits,
            "loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()),
        }


def grouped_decoder(layers: int = 3, interleaved: bool = False) -> GroupedDecoder:
    """A decoder with weights large enough that a mistake in any of them is visible."""
    torch.manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    model = GroupedDecoder(layers, interleaved).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.25 if parameter.dim() > 1 else 0.1
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return model
