"""Small models in plain torch, for tests that do not need transformers."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """One post-norm encoder layer."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (p(x).view(batch, length, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        x = self.first(x + self.drop(self.o(mixed.transpose(1, 2).reshape(batch, length, width))))
        return self.second(x + self.drop(self.down(nn.functional.gelu(self.up(x)))))


class TinyEncoder(nn.Module):
    """Two layers over token ids, with a padding mask."""

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.head = nn.Linear(width, 24)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        mask = attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return {"hidden": x, "logits": self.head(x)}


def enlarge(model: nn.Module) -> None:
    """Draw weights large enough that a mistake in any of them is visible."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)


def tiny_encoder(seed: int = 0, **options: int) -> TinyEncoder:
    """A TinyEncoder with weights large enough that a mistake in any of them is visible."""
    torch.manual_seed(seed)
    model = TinyEncoder(**options).eval()
    enlarge(model)
    return model


def tokens(batch: int = 3, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with a ragged padding mask."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor([max(1, length - row) for row in range(batch)])
    return {
        "ids": torch.randint(0, 50, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < kept[:, None]).long(),
    }


class TinyDecoder(nn.Module):
    """Causal layers over token ids, with learned positions."""

    def __init__(
        self,
        width: int = 32,
        heads: int = 4,
        hidden: int = 64,
        layers: int = 2,
        vocabulary: int = 50,
        longest: int = 40,
    ) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        x = self.embed(ids) + self.places(places)
        mask = (places[None, :] <= places[:, None]) & attention_mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        logits: torch.Tensor = self.head(x)
        return logits


def tiny_decoder(seed: int = 0, **options: int) -> TinyDecoder:
    """A TinyDecoder with weights large enough that a mistake in any of them is visible."""
    torch.manual_seed(seed)
    model = TinyDecoder(**options).eval()
    enlarge(model)
    return model


def tied_decoder() -> TinyDecoder:
    """A decoder whose head is its embedding; its width is no multiple of a group of inputs."""
    torch.manual_seed(0)
    model = TinyDecoder(width=48, heads=4, hidden=64, layers=2, vocabulary=50).eval()
    model.head.weight = model.embed.weight
    enlarge(model)
    return model
