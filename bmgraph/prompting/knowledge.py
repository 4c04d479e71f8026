"""Words from a knowledge base: how relevant each is for its class, and how much it counts (KPT, Hu et al. 2022, arXiv:2108.02035)."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy, normalize

from bmgraph.errors import InputError


def relevances(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities of words f[N, C, W] at N masks, 0 where there is no word -> how relevant each word is for its class f[C, W].

    A word's vector has its probabilities for the N texts; a class is as its first word. The relevance is the cosine of a word and its
    class, over the mean of those of the word and the other classes.
    """
    vectors = normalize(probabilities.double(), dim=0)
    cosines = torch.einsum("ncw,nd->cwd", vectors, vectors[:, :, 0])
    own = torch.diagonal(cosines, dim1=0, dim2=2).T
    others = (cosines.sum(-1) - own) / (cosines.shape[-1] - 1)
    return own / others.clamp(min=1e-12)


def fitted_weights(
    scores: torch.Tensor, there: torch.Tensor, labels: torch.Tensor, steps: int, lr: float
) -> torch.Tensor:
    """Log-probabilities of words f[N, C, W] for labelled rows i64[N] -> the shares of words in their classes f[C, W].

    Shares are a softmax of numbers that begin at 0 (all words count alike), after `steps` of Adam on the mean cross-entropy.
    """
    if labels.shape != scores.shape[:1] or labels.is_floating_point():
        raise InputError(
            f"there are logits of {len(scores)} rows, and labels {list(labels.shape)} of {labels.dtype}: give the number of the "
            "class of each"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise InputError(
            f"labels are from {int(labels.min())} to {int(labels.max())}: there are {scores.shape[1]} classes"
        )
    found, labels = scores.masked_fill(~there, 0.0), labels.cpu()
    weights = torch.zeros(there.shape, requires_grad=True)
    rule = torch.optim.Adam([weights], lr=lr)
    for _ in range(steps):
        rule.zero_grad()
        shares = weights.masked_fill(~there, -torch.inf).softmax(-1)
        torch.autograd.backward(cross_entropy((found * shares).sum(-1), labels))
        rule.step()
    return weights.detach().masked_fill(~there, -torch.inf).softmax(-1)
