"""Training inside a pass, on the trainer that users have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from bmgraph.errors import ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.report import Report
from bmgraph.utils.progress import track
from bmgraph.verify.reference_outputs import Batch


@dataclass(frozen=True)
class Trained:
    """A program after training, and the loss of each step."""

    program: Program
    losses: tuple[float, ...]


def train(program: Program, batches: Iterable[Batch], steps: int, backend: Any) -> Trained:
    """Train on the output called `loss`, one step a batch; `backend` is a configuration with an optimizer.

    Under torch.distributed all ranks call this with the same batches. Raises ResourceError for a `backend` that does
    not train.
    """
    if getattr(backend, "optimizer", None) is None or not hasattr(backend, "build"):
        raise ResourceError(
            f"resource 'trainer' is {backend!r}, which does not train: give Torch(optimizer=AdamW(lr=...))"
        )
    trainer = backend.build(program, Report())
    losses = tuple(trainer.step(batch).loss for batch in track(batches, "training", total=steps))
    return Trained(trainer.program(), losses)
