"""The encoders of `benchmarks.encoder`: trained ones, and random ones of known shapes, with batches for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import assets

Batch = dict[str, torch.Tensor]


@dataclass
class Encoder:
    """A model with batches: `batch(start, size, length, shortest)` gives `size` rows of `length` tokens, without padding or with
    row lengths from `shortest` on; other starts give other rows. `folder`: where it lies in a form that others read."""

    model: nn.Module
    batch: Callable[[int, int, int, int | None], Batch]
    folder: Path | None = None
    tokenizer: Any = None
    texts: list[tuple[str, Any]] = field(default_factory=list)
    count: int = 32
    longest: int = 128

    def calibration(self) -> list[Batch]:
        """Batches of 8 rows of up to 128 tokens, from rows that no measurement uses."""
        return [self.batch(2000 + 64 * i, 8, self.longest, 24) for i in range(self.count)]


def lengths(size: int, length: int, shortest: int | None) -> list[int]:
    """The number of tokens of each row."""
    if shortest is None or size == 1:
        return [length] * size
    return [shortest + (length - shortest) * row // (size - 1) for row in range(size)]


def minilm() -> Encoder:
    """The sentence encoder, on SMS."""
    from transformers import AutoModel, AutoTokenizer

    source = assets.minilm()
    tokenizer, sms = AutoTokenizer.from_pretrained(str(source)), assets.sms()
    texts = [text for text, _ in sms]

    def batch(start: int, size: int, length: int, shortest: int | None = None) -> Batch:
        ids, mask = torch.zeros(size, length, dtype=torch.long), torch.zeros(size, length, dtype=torch.long)
        for row, kept in enumerate(lengths(size, length, shortest)):
            parts = range(8 * (1 + length // 128))
            text = " ".join(texts[(start + row * 8 + i) % len(texts)] for i in parts)
            found = tokenizer(
                text, truncation=True, max_length=kept, padding="max_length", return_tensors="pt"
            )
            ids[row, :kept], mask[row, :kept] = found["input_ids"][0], 1
        return {"input_ids": ids, "attention_mask": mask}

    model = AutoModel.from_pretrained(str(source)).eval()
    return Encoder(model, batch, source, tokenizer, sms)


def antiberty() -> Encoder:
    """An encoder from another domain: protein residues, eight layers of width 512."""
    return _bert("antiberty==0.1.3", "antiberty/trained_models/AntiBERTy_md_smooth", 5, 25)


def _bert(package: str, prefix: str, low: int, high: int) -> Encoder:
    """A BERT of a package, on random ids from `low` to below `high`."""
    from transformers import BertConfig, BertModel

    folder = assets.unpacked(package, prefix)
    config = json.loads((folder / "config.json").read_text())
    taken = BertConfig().to_dict().keys() - {"architectures"}
    known = {key: value for key, value in config.items() if key in taken}
    model = BertModel(BertConfig(**known), add_pooling_layer=False).eval()
    state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    state = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    missing, _ = model.load_state_dict(state, strict=False)
    assert not [name for name in missing if "position_ids" not in name], missing
    return Encoder(model, random_ids(low, high))


def random_ids(low: int, high: int) -> Callable[[int, int, int, int | None], Batch]:
    """Batches of random ids."""

    def batch(start: int, size: int, length: int, shortest: int | None = None) -> Batch:
        ids = torch.randint(low, high, (size, length), generator=torch.Generator().manual_seed(start))
        kept = torch.tensor(lengths(size, length, shortest))
        return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < kept[:, None]).long()}

    return batch


def random_bert() -> Encoder:
    """BERT-base's shape with random weights: 12 layers of 768."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(), add_pooling_layer=False).eval()
    return Encoder(model, random_ids(1000, 30000), count=8)


def random_vit() -> Encoder:
    """ViT-base's shape with random weights, on random images: 12 layers of 768, 197 positions."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    model = ViTModel(ViTConfig(), add_pooling_layer=False).eval()

    def batch(start: int, size: int, length: int, shortest: int | None = None) -> Batch:
        return {
            "pixel_values": torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(start))
        }

    return Encoder(model, batch, count=4)


ENCODERS: dict[str, Callable[[], Encoder]] = {
    "minilm": minilm,
    "antiberty": antiberty,
    "bert-base, random": random_bert,
    "vit-base, random": random_vit,
}
"""Name -> the encoder."""
