"""A tiny language model with dropout, and batches of it, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program

Batch = dict[str, torch.Tensor]
IDS = 13


class Words(nn.Module):
    """Predicts labels of positions from their ids alone."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.words, self.drop, self.norm = nn.Embedding(IDS, 6), nn.Dropout(dropout), nn.LayerNorm(6)
        self.hidden, self.head = nn.Linear(6, 7), nn.Linear(7, IDS)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        """ids, labels i64[B, S] -> loss f[]."""
        logits = self.head(torch.relu(self.hidden(self.drop(self.norm(self.words(ids))))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def words() -> Words:
    """The model, with the same weights at each call."""
    torch.manual_seed(0)
    return Words()


@cache
def captured_words() -> Program:
    """The model, captured once per process."""
    return bg.capture(words(), batch_of(0))


def batch_of(seed: int, rows: int = 4, length: int = 5) -> Batch:
    """A batch with ragged labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IDS, (rows, length), generator=generator)
    labels = torch.randint(0, IDS, (rows, length), generator=generator)
    kept = torch.arange(length)[None] < length - torch.arange(rows)[:, None] % length
    return {"ids": ids, "labels": torch.where(kept, labels, -100)}


class Rows(torch.utils.data.Dataset[Batch]):
    """Rows whose ids are noisy where asked: noise is drawn from torch's global generator."""

    def __init__(self, count: int = 24, noisy: bool = False) -> None:
        self._all = batch_of(7, count)
        self._noisy = noisy

    def __len__(self) -> int:
        return len(self._all["ids"])

    def __getitem__(self, index: int) -> Batch:
        row = {name: value[index] for name, value in self._all.items()}
        if self._noisy:
            row["ids"] = (row["ids"] + torch.randint(0, 2, row["ids"].shape)) % IDS
        return row


class Stateful:
    """A loader that says where it is."""

    def __init__(self, batches: list[Batch]) -> None:
        self._batches, self.next, self.read = batches, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        while self.next < len(self._batches):
            self.next, self.read = self.next + 1, self.read + 1
            yield self._batches[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, object]:
        """Plain values, of kinds that JSON does not have."""
        return {"next": torch.tensor(self.next), "of": (len(self._batches), b"\0"), 1: None}  # type: ignore[dict-item]

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Go on from there."""
        assert state_dict["of"] == (len(self._batches), b"\0")
        self.next = int(state_dict["next"])  # type: ignore[call-overload]
