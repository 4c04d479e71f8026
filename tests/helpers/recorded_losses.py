"""The losses of what passes train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bmgraph.pipeline


@contextmanager
def recorded_losses() -> Iterator[list[float]]:
    """The losses of all steps of passes that train within, as they come."""
    found: list[float] = []
    train = bmgraph.pipeline.train_in_pass

    def watched(*arguments: Any) -> Any:
        done = train(*arguments)
        found.extend(done.losses)
        return done

    bmgraph.pipeline.train_in_pass = watched
    try:
        yield found
    finally:
        bmgraph.pipeline.train_in_pass = train
