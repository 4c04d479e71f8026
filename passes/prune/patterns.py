"""Masks of the weights that are kept: N of every M consecutive ones, or a share of a row, a layer or the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import combinations, product

import torch

from bmgraph.errors import InputError

UNSTRUCTURED = "unstructured"

LARGEST_TRANSPOSABLE = 4
"""M, up to which all masks of M x M whose rows and columns keep N are compared: 90 for 2:4."""


def parse_pattern(text: str) -> tuple[int, int] | None:
    """(N, M) of a pattern such as "2:4", None for "unstructured". Raises InputError for another."""
    if text == UNSTRUCTURED:
        return None
    kept, _, size = text.partition(":")
    if not (kept.isdecimal() and size.isdecimal() and 0 < int(kept) < int(size) <= 64):
        raise InputError(
            f"pattern={text!r}: give N:M, such as 2:4, with N below M and M up to 64, or {UNSTRUCTURED!r} with sparsity="
        )
    return int(kept), int(size)


def sparsity_mask(scores: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """bool[out, in]: true for the `kept` highest scores in every `size` consecutive ones of a row; ties keep the first.

    `scores` is f[out, in], `in` a multiple of `size`.
    """
    if scores.device.type == "meta":
        return torch.empty_like(scores, dtype=torch.bool)
    groups = scores.reshape(scores.shape[0], -1, size)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :kept], True)
    return mask.reshape(scores.shape)


def transposable_mask(scores: torch.Tensor, kept: int, size: int) -> torch.Tensor:
    """bool[out, in]: in every block of `size` x `size`, `kept` of each row and of each column, with the highest sum of scores.

    A transposed weight then has the pattern too, so that the backward product is sparse as well (Hubara et al. 2021,
    arXiv:2102.08124). `scores` is f[out, in], both multiples of `size`, which is at most LARGEST_TRANSPOSABLE.
    """
    if scores.device.type == "meta":
        return torch.empty_like(scores, dtype=torch.bool)
    masks = _square_masks(kept, size).to(scores)
    rows, columns = (extent // size for extent in scores.shape)
    blocks = scores.reshape(rows, size, columns, size).transpose(1, 2).reshape(rows * columns, size * size)
    best = (blocks @ masks.flatten(1).T).argmax(-1)
    chosen = masks[best].bool().reshape(rows, columns, size, size)
    return chosen.transpose(1, 2).reshape(scores.shape)


@cache
def _square_masks(kept: int, size: int) -> torch.Tensor:
    """f[masks, size, size]: all 0/1 matrices whose rows and columns sum to `kept`."""
    rows = [[float(column in chosen) for column in range(size)] for chosen in combinations(range(size), kept)]
    found = torch.tensor(list(product(rows, repeat=size)))
    return found[(found.sum(1) == kept).all(-1)]


def lowest_share(scores: torch.Tensor, share: float, by_row: bool) -> torch.Tensor:
    """bool of the shape of scores f[out, in]: false for the lowest share of each row, or of all; ties keep the last.

    As many as round(share * elements) are dropped.
    """
    if scores.device.type == "meta":
        return torch.empty_like(scores, dtype=torch.bool)
    flat = scores if by_row else scores.reshape(1, -1)
    dropped = round(share * flat.shape[1])
    order = flat.argsort(dim=-1, stable=True)
    mask = torch.ones_like(flat, dtype=torch.bool).scatter_(-1, order[:, :dropped], False)
    return mask.reshape(scores.shape)


def lowest_of_all(scores: Mapping[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    """The masks of several matrices of scores, of which the lowest share together is dropped; ties keep the last."""
    if any(item.device.type == "meta" for item in scores.values()):
        return {name: torch.empty_like(item, dtype=torch.bool) for name, item in scores.items()}
    flat = torch.cat([item.reshape(-1).float() for item in scores.values()])
    mask = lowest_share(flat[None], share, True)[0]
    sizes = [item.numel() for item in scores.values()]
    return {
        name: part.reshape(item.shape) for (name, item), part in zip(scores.items(), torch.split(mask, sizes))
    }
