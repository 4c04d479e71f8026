"""Capture's own runs of the user's model: they leave nothing behind and say nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bmgraph.frontend.as_found import left_as_found
from bmgraph.frontend.kept_weights import weights_as_found


@contextmanager
def own_run(model: nn.Module) -> Iterator[None]:
    """One run of the model, without gradients and without the warnings of batches that the user did not give."""
    with weights_as_found(model), left_as_found(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
