"""PrototypicalVerbalizer: classes by prototypes of hidden states at the mask (Cui et al. 2022, arXiv:2203.09770)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch.nn.functional import normalize

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import HIDDEN, ClassScores, checked_classes


class PrototypicalVerbalizer(ClassScores):
    """Scores of classes are cosines of the projected hidden state at the mask and a prototype of each.

    projection f[E, d], prototypes f[C, E]. `fit` learns both from hidden states of labelled rows, the model staying as it is.
    """

    kind: ClassVar[str] = "prototypes"
    reads: ClassVar[str] = HIDDEN

    def __init__(self, classes: Sequence[str], projection: torch.Tensor, prototypes: torch.Tensor) -> None:
        self.classes = checked_classes(classes)
        if prototypes.shape != (len(self.classes), projection.shape[0]) or projection.dim() != 2:
            raise InputError(
                f"prototypes have shape {list(prototypes.shape)} and the projection {list(projection.shape)}: give "
                f"[{len(self.classes)}, E] and [E, d]"
            )
        self.projection = projection.detach().float().cpu()
        self.prototypes = prototypes.detach().float().cpu()

    @classmethod
    def fit(
        cls,
        hidden: torch.Tensor,
        labels: torch.Tensor,
        classes: Sequence[str],
        *,
        size: int = 64,
        steps: int = 200,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> Self:
        """Learn from hidden states f[N, d] at the mask and labels i64[N]: a projection to `size` numbers and the prototypes,
        by `steps` of Adam on `contrastive_loss`. Raises InputError for a class without rows."""
        names = checked_classes(classes)
        if hidden.dim() != 2 or labels.shape != hidden.shape[:1]:
            raise InputError(
                f"hidden states have shape {list(hidden.shape)}, labels {list(labels.shape)}: give [N, d] and [N]"
            )
        for index, name in enumerate(names):
            if not bool((labels == index).any()):
                raise InputError(f"the class {name!r} has no rows: give some of each class")
        generator = torch.Generator().manual_seed(seed)
        hidden, labels = hidden.detach().float().cpu(), labels.cpu()
        bound = 1 / math.sqrt(hidden.shape[1])
        projection = (
            torch.empty(size, hidden.shape[1]).uniform_(-bound, bound, generator=generator).requires_grad_()
        )
        prototypes = torch.randn(len(names), size, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([projection, prototypes], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = contrastive_loss(hidden @ projection.T, labels, prototypes)
            torch.autograd.backward(loss)
            optimizer.step()
        return cls(names, projection, prototypes)

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """hidden states f[B, 1, d] at the mask -> cosines f[B, C]. Raises InputError for another d."""
        if values.shape[-1] != self.projection.shape[1]:
            raise InputError(
                f"the prototypes are of {self.projection.shape[1]} features, and the model gives {values.shape[-1]}: name the "
                "output that they were fitted on"
            )
        found = values[:, 0].float() @ self.projection.to(values.device).T
        return normalize(found, dim=-1) @ normalize(self.prototypes.to(values.device), dim=-1).T

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "kind": self.kind, "classes": list(self.classes), "projection": self.projection.tolist(),
            "prototypes": self.prototypes.tolist(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The verbalizer of `as_json`."""
        return cls(data["classes"], torch.tensor(data["projection"]), torch.tensor(data["prototypes"]))


def contrastive_loss(vectors: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    """vectors f[N, E], prototypes f[C, E] -> the mean over pairs of rows of one class, and over rows with their prototype, of
    -log(exp(s) / (exp(s) + sum of exp of the similarities with what is of other classes)), s the cosine."""
    vectors, prototypes = normalize(vectors, dim=-1), normalize(prototypes, dim=-1)
    among, with_prototypes = vectors @ vectors.T, prototypes @ vectors.T
    same = labels[:, None] == labels[None]
    own = torch.arange(len(prototypes))[:, None] == labels[None]
    return _info_nce(among, same) + _info_nce(with_prototypes, own)


def _info_nce(similarity: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    others = similarity.masked_fill(same, -torch.inf).logsumexp(-1, keepdim=True)
    return (torch.logaddexp(similarity, others) - similarity)[same].mean()
