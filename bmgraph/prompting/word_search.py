"""The words that tell classes best, by what the model predicts for labelled rows (PETAL, arXiv:2010.13641)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bmgraph.errors import InputError

SCORES = ("llr", "ce")
SMALL = 1e-15
"""Keeps logarithms of probabilities finite."""


def found_words(
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    count: int,
    candidates: int,
    score: str,
    balance: bool,
    allowed: Sequence[int] | None = None,
) -> list[list[int]]:
    """For each class the `count` ids with the highest score, of `allowed` ones; see `Verbalizer.searched`."""
    if score not in SCORES:
        raise InputError(f"score={score!r}: choose one of {', '.join(SCORES)}")
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}: give [N, V] and [N], of the same rows"
        )
    if count < 1 or candidates < count:
        raise InputError(
            f"count={count}, candidates={candidates}: give 1 word or more, and as many candidates or more"
        )
    probabilities = logits.detach().double().softmax(-1)
    log, log_not = (probabilities + SMALL).log(), (1 - probabilities + SMALL).log()
    kept = torch.tensor([] if allowed is None else list(allowed), dtype=torch.int64)
    found = []
    for index in range(classes):
        own = labels == index
        if not bool(own.any()) or bool(own.all()):
            raise InputError(
                f"class {index} has {int(own.sum())} of {len(labels)} rows: give rows of it and of others"
            )
        near = torch.argsort(log[own].sum(0), descending=True, stable=True)
        near = (near if allowed is None else near[torch.isin(near.cpu(), kept).to(near.device)])[:candidates]
        weight = float(own.sum() / (~own).sum()) if balance else 1.0
        inside, outside = log[own][:, near].sum(0), weight * log_not[~own][:, near].sum(0)
        if score == "llr":
            inside = inside - log_not[own][:, near].sum(0)
            outside = outside - weight * log[~own][:, near].sum(0)
        best = torch.argsort(inside + outside, descending=True, stable=True)[:count]
        found.append([int(item) for item in near[best]])
    return found
