"""An encoder-decoder as two graphs with a signature each: `encode` gives the `memory` that `forward` takes."""

from __future__ import annotations

import torch
from torch import nn

import bmgraph as bg
from bmgraph.frontend.capture_methods import combined
from bmgraph.ir.program import Program

WIDTH, HEADS, HIDDEN, VOCABULARY = 16, 2, 32, 24


class Attend(nn.Module):
    """Attention of x to y, causal where both are the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, causal: bool
    ) -> torch.Tensor:
        q, k, v = (
            layer(value).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, y), (self.v, y))
        )
        kept = None if mask is None else mask[:, None, None].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=kept, is_causal=causal)
        out: torch.Tensor = self.norm(x + self.o(mixed.transpose(1, 2).flatten(2)))
        return out


class Mix(nn.Module):
    """A feed-forward with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = (
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(HIDDEN, WIDTH),
            nn.LayerNorm(WIDTH),
        )
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x + self.drop(self.down(nn.functional.gelu(self.up(x)))))
        return out


class Translator(nn.Module):
    """An encoder over ids and a decoder over decoder_ids, which share the embedding; ids have a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder, self.encoder_mix = Attend(), Mix()
        self.own, self.cross, self.decoder_mix = Attend(), Attend(), Mix()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, decoder_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        memory = self.encoder_mix(self.encoder(x, x, attention_mask, False))
        y = self.embed(decoder_ids)
        y = self.cross(self.own(y, y, None, True), memory, attention_mask, False)
        return {"scores": self.head(self.decoder_mix(y))}


class Encode(nn.Module):
    """The encoder of a translator, with its names."""

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.embed, self.encoder, self.encoder_mix = model.embed, model.encoder, model.encoder_mix

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids)
        return {"memory": self.encoder_mix(self.encoder(x, x, attention_mask, False))}


class Decode(nn.Module):
    """The decoder of a translator, with its names."""

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.embed, self.own, self.cross = model.embed, model.own, model.cross
        self.decoder_mix, self.head = model.decoder_mix, model.head

    def forward(
        self, memory: torch.Tensor, attention_mask: torch.Tensor, decoder_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        y = self.embed(decoder_ids)
        y = self.cross(self.own(y, y, None, True), memory, attention_mask, False)
        return {"scores": self.head(self.decoder_mix(y))}


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """What the whole model takes."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    return {
        "ids": torch.randint(VOCABULARY, (3, 6), generator=generator),
        "attention_mask": mask,
        "decoder_ids": torch.randint(VOCABULARY, (3, 5), generator=generator),
    }


def captured(training: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Translator, Program]:
    """A translator, and its program of the graphs `encode` and `forward`."""
    model = Translator().train(training).to(dtype)
    given = batch()
    encoded = bg.capture(
        Encode(model).train(training), {name: given[name] for name in ("ids", "attention_mask")}
    )
    memory = encoded(ids=given["ids"], attention_mask=given["attention_mask"])["memory"]
    rest = {name: given[name] for name in ("attention_mask", "decoder_ids")}
    decoded = bg.capture(Decode(model).train(training), {"memory": memory, **rest})
    return model, combined({"encode": encoded, "forward": decoded})
