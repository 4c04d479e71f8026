"""A small encoder-decoder in plain torch: learned positions on both sides, attention over a masked source."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers.models import enlarge

IDS, ROOM = 50, 40
"""The size of its vocabulary, and the positions that each side has rows for."""


def heads(x: torch.Tensor) -> torch.Tensor:
    """x f[B, S, 32] as heads f[B, 4, S, 8]."""
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


class Translator(nn.Module):
    """`blind`: its cross-attention reads padding too, as if it had no mask. `counted`: its decoder counts positions in a way that a
    cache cannot shift behind padding."""

    def __init__(self, blind: bool = False, layers: int = 1, counted: bool = False) -> None:
        super().__init__()
        self.blind, self.counted = blind, counted
        self.source, self.target, self.head = nn.Embedding(IDS, 32), nn.Embedding(IDS, 32), nn.Linear(32, IDS)
        self.source_places, self.target_places = nn.Embedding(ROOM, 32), nn.Embedding(ROOM, 32)
        self.q, self.key, self.value, self.o = (
            nn.ModuleList(nn.Linear(32, 32) for _ in range(2 * layers + 1)) for _ in range(4)
        )

    def attend(
        self, place: int, x: torch.Tensor, read: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        q, k, v = heads(self.q[place](x)), heads(self.key[place](read)), heads(self.value[place](read))
        found = nn.functional.scaled_dot_product_attention(
            q, k, v, seen, is_causal=read is x and seen is None
        )
        return x + self.o[place](found.transpose(1, 2).flatten(2))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> torch.Tensor:
        seen = attention_mask.bool()[:, None, None]
        memory = self.source(input_ids) + self.source_places(torch.arange(input_ids.shape[1]))
        memory = self.attend(0, memory, memory, seen)
        places = torch.arange(decoder_input_ids.shape[1])
        if self.counted:
            places = torch.ones(decoder_input_ids.shape, dtype=torch.int64).cumsum(1) - 1
        x = self.target(decoder_input_ids) + self.target_places(places)
        for place in range(1, len(self.q), 2):
            x = self.attend(place, x, x, None)
            x = self.attend(place + 1, x, memory, None if self.blind else seen)
        logits: torch.Tensor = self.head(x)
        return logits


def translator(blind: bool = False, layers: int = 1, counted: bool = False) -> Translator:
    """A Translator with weights large enough that a mistake in any of them is visible."""
    torch.manual_seed(0)
    model = Translator(blind, layers, counted).eval()
    enlarge(model)
    return model


def pair(rows: int = 2, source: int = 7, target: int = 5) -> dict[str, torch.Tensor]:
    """Sources, the first of which is padded, and beginnings of targets."""
    drawn = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, source, dtype=torch.int64)
    mask[0, source // 2 :] = 0
    ids = [torch.randint(IDS, (rows, size), generator=drawn) for size in (source, target)]
    return {"input_ids": ids[0], "attention_mask": mask, "decoder_input_ids": ids[1]}
