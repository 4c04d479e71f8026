"""Label words by what the model itself says for a few labelled rows, re-ranked by how well they classify these (LM-BFF, Gao et
al. 2021, arXiv:2012.15723)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bmgraph.errors import InputError

MOST = 100_000
"""Assignments of words to classes that are tried at most."""


def generated_words(
    logits: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    candidates: int,
    count: int,
    allowed: Sequence[int] | None = None,
) -> list[tuple[tuple[int, ...], float]]:
    """logits f[N, V] at the masks of labelled rows i64[N] -> `count` assignments of one id to each class, and the share of the
    rows that each classifies, the best first.

    Of each class the `candidates` ids of the highest mean log-probability over its rows (of `allowed` ones) are tried, all
    assignments of them (fewer candidates where these are more than `MOST`); of equal shares the likelier one comes first.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}: give [N, V] and [N], of the same rows"
        )
    if candidates < 1 or count < 1:
        raise InputError(f"candidates={candidates}, count={count}: give 1 or more")
    logits, labels = logits.detach().double().cpu(), labels.cpu()
    ids = torch.arange(logits.shape[1])
    if allowed is not None:
        ids = ids[torch.isin(ids, torch.tensor(list(allowed), dtype=torch.int64))]
    if len(ids) < classes:
        raise InputError(f"{len(ids)} words may be chosen, for {classes} classes: allow more")
    tried = min(candidates, len(ids), max(1, int(MOST ** (1 / classes))))
    log = torch.log_softmax(logits, -1)[:, ids]
    near, likely = [], []
    for index in range(classes):
        if not bool((labels == index).any()):
            raise InputError(f"class {index} has no rows: give some of each class")
        mean = log[labels == index].mean(0)
        order = torch.argsort(mean, descending=True, stable=True)[:tried]
        near.append(ids[order])
        likely.append(mean[order])
    places = torch.cartesian_prod(*[torch.arange(tried)] * classes).reshape(-1, classes)
    chosen = torch.stack([near[index][places[:, index]] for index in range(classes)], -1)
    worth = torch.stack([likely[index][places[:, index]] for index in range(classes)], -1).sum(-1)
    ordered = chosen.sort(-1).values
    distinct = (ordered[:, 1:] != ordered[:, :-1]).all(-1)
    chosen, worth = chosen[distinct], worth[distinct]
    if not len(chosen):
        raise InputError(
            f"all assignments of the {tried} likeliest words of each of {classes} classes give one to two classes: allow others"
        )
    right = torch.zeros(len(chosen), dtype=torch.float64)
    for row, label in zip(logits, labels.tolist()):
        right += row[chosen].argmax(-1) == label
    order = torch.argsort(worth, descending=True, stable=True)
    order = order[torch.argsort(right[order], descending=True, stable=True)][:count]
    return [(tuple(chosen[place].tolist()), float(right[place]) / len(labels)) for place in order]
