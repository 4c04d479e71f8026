"""The states of the random generators that data loaders draw from: those of torch (on the host), numpy and Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bmgraph.errors import BundleError

State = dict[str, Any]
"""By library, plain values."""


def generators() -> State:
    """The present states."""
    return {
        "torch": torch.random.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_generators(state: State) -> None:
    """Set the states that `generators` gave."""
    torch.random.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def check_generators(state: object, where: str) -> State:
    """The states, if they can be set; raises BundleError, naming `where`, if not."""
    with kept_generators():
        try:
            set_generators(state)  # type: ignore[arg-type]
        except (TypeError, ValueError, KeyError, RuntimeError, IndexError) as error:
            raise BundleError(f"{where} holds states of random generators that are not valid") from error
    return state  # type: ignore[return-value]


@contextmanager
def kept_generators() -> Iterator[None]:
    """Whatever is drawn within leaves the generators as they were."""
    state = generators()
    try:
        yield
    finally:
        set_generators(state)
