"""Garbage collection while a large model is captured and compiled."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

LARGE = 2**26
"""Bytes of weights from which on it is worth the while."""

YOUNGEST, SELDOM = 50_000, 50
"""New objects for one collection of the youngest, and collections of young objects for one of all that the block made."""


def is_large(weights: Iterable[torch.Tensor]) -> bool:
    """Whether a model is so large that collecting garbage, which takes as long as for any other, is little beside its build."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights) >= LARGE


@contextmanager
def old_objects_kept(weights: Iterable[torch.Tensor]) -> Iterator[None]:
    """For a large model, collect garbage once, and leave what is there then out of the collections inside of the block.

    Tracing makes so many small objects that all others (the modules of torch, of transformers, of the model) are searched for
    garbage several times, a tenth of the time of a start. Of what is made inside, the youngest are searched when there are many,
    and what lives longer more seldom: another tenth.
    """
    if gc.get_freeze_count() or not is_large(weights):  # frozen by an outer block or the user: not ended here
        yield
        return
    gc.collect()
    gc.freeze()
    youngest, young, old = gc.get_threshold()
    gc.set_threshold(max(youngest, YOUNGEST) if youngest else 0, young, max(old, SELDOM))
    try:
        yield
    finally:
        gc.set_threshold(youngest, young, old)
        gc.unfreeze()
