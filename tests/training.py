"""What tests of training share: toy models with labels, and plain PyTorch loops to be held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from tests.zoo import BY_NAME, Batch

IGNORED = -100
LANGUAGE = ("llama", "gpt2", "t5")
"""Toy architectures of the zoo that compute a loss from labels."""


def toy(name: str) -> nn.Module:
    """A toy language model by its name in the zoo."""
    return BY_NAME[name].build()


def labelled(name: str, rows: int, length: int, seed: int = 0) -> Batch:
    """A batch with labels that are ragged: a row has as many as its number leaves."""
    batch = BY_NAME[name].example(rows, length)
    generator = torch.Generator().manual_seed(seed)
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    labels = torch.randint(3, 99, ids.shape, generator=generator)
    kept = torch.arange(ids.shape[1])[None] < (ids.shape[1] - torch.arange(rows) * 2 % ids.shape[1])[:, None]
    for key in ("input_ids", "decoder_input_ids"):
        if key in batch:
            batch[key] = torch.randint(3, 99, batch[key].shape, generator=generator)
    return {**batch, "labels": torch.where(kept, labels, IGNORED)}


def batches(name: str, count: int, rows: int = 5) -> list[Batch]:
    """Batches of changing lengths."""
    return [labelled(name, rows, 9 + 2 * (index % 3), seed=index) for index in range(count)]


def naive_losses(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    given: Iterable[Batch],
    loss: Callable[[nn.Module, Batch], torch.Tensor] = lambda model, batch: model(**batch)["loss"],
) -> list[float]:
    """The losses of a plain PyTorch loop, one process, the whole batch at once."""
    found = []
    for batch in given:
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        found.append(value.item())
    return found
