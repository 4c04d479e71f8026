"""Capture's own runs of the user's model: they leave nothing behind and say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from bmgraph.frontend.as_found import left_as_found
from bmgraph.frontend.kept_weights import weights_as_found
from bmgraph.ops.index_bounds import checked_indices


@contextmanager
def own_run(model: nn.Module) -> Iterator[None]:
    """One run of the model, without gradients and without the warnings of batches that the user did not give.

    The model may refuse such a batch: on a CUDA device too an index that is out of range is then an error of that run alone.
    """
    held = next(chain(model.parameters(), model.buffers()), None)
    with weights_as_found(model), left_as_found(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with checked_indices("cpu" if held is None else held.device):
            yield
