"""Training inside a pass, on the trainer that users have."""

from __future__ import annotations

from collections.abc import Iterable

from bmgraph.backends.backend_base import Backend
from bmgraph.backends.torch.backend import Torch
from bmgraph.errors import ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Trained
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.optimizers import AdamW
from bmgraph.utils.progress import track
from bmgraph.verify.reference_outputs import Batch


def train_in_pass(given: object, program: Program, batches: Iterable[Batch], steps: int) -> Trained:
    """Train on the output called `loss`, one step a batch; `given` is the resource "trainer", None for AdamW at its
    default rate.

    Under torch.distributed all ranks call this with the same batches. Raises ResourceError for a `given` that does not
    train.
    """
    backend = Torch(optimizer=AdamW()) if given is None else given
    trainer = backend.build(program, Report()) if isinstance(backend, Backend) and backend.trains else None
    if not isinstance(trainer, Trainer):
        raise ResourceError(
            f"resource 'trainer' is {given!r}, which does not train: give Torch(optimizer=AdamW(lr=...))"
        )
    losses = tuple(trainer.step(batch).loss for batch in track(batches, "training", total=steps))
    return Trained(trainer.program(), losses)
