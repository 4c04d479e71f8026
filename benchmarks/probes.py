"""Probes: what a logistic regression reads from mean-pooled embeddings, on splits that all contestants share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Batch = dict[str, torch.Tensor]

ROWS = 32
"""Texts of a batch."""


def tokenized(tokenizer: Any, texts: Sequence[str], longest: int) -> Batch:
    """Texts as ids and a mask, cut to `longest` tokens and padded to the longest of them."""
    made = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def embed(call: Callable[[Batch], Any], tokenizer: Any, texts: Sequence[str], longest: int) -> np.ndarray:
    """f[texts, features]: the means over tokens of the hidden states f[B, S, features] that `call` gives for a batch. Texts of like
    lengths stand in one batch; `call` may leave out positions behind the longest text."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), ROWS):
        places = order[start : start + ROWS]
        batch = tokenized(tokenizer, [texts[place] for place in places], longest)
        hidden = torch.as_tensor(np.asarray(call(batch)))
        mask = batch["attention_mask"][:, : hidden.shape[1]].unsqueeze(-1)
        found |= dict(zip(places, ((hidden * mask).sum(1) / mask.sum(1)).numpy()))
    return np.stack([found[place] for place in range(len(texts))])


def accuracies(vectors: np.ndarray, labels: Sequence[Any], fitted: int, splits: int) -> list[float]:
    """The accuracy of each split: `fitted` texts, drawn by the split's number, fit a logistic regression, and all others score it."""
    known, found = np.array(labels), []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(known))
        found.append(accuracy(vectors, known, order[:fitted], order[fitted:]))
    return found


def accuracy(vectors: np.ndarray, labels: np.ndarray, fitted: Any, scored: Any) -> float:
    """The accuracy on the texts `scored` of a logistic regression that was fitted to the texts `fitted`."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=2000).fit(vectors[fitted], labels[fitted])
    return float((model.predict(vectors[scored]) == labels[scored]).mean())
