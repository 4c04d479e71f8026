"""TaskBatches: rows as batches of a task, shuffled anew in each epoch, which go on where a checkpoint left them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.rows import Row, some_rows

if TYPE_CHECKING:
    from bmgraph.prompting.task import Task


class TaskBatches:
    """Batches of `size` rows, the last one of fewer; in their order, or with a `seed` shuffled otherwise in each epoch.

    It has `state_dict` and `load_state_dict`, so that `trainer.fit(resume="auto")` goes on in the middle of an epoch. Obtain
    it from `task.batches(rows, size)`. Raises InputError without rows, and for a size or seed that is not valid.
    """

    def __init__(self, task: Task, rows: Sequence[Row], size: int, seed: int | None = None) -> None:
        if type(size) is not int or size < 1:
            raise InputError(f"size={size!r}: give a number of rows, 1 or more")
        if seed is not None and type(seed) is not int:
            raise InputError(f"seed={seed!r}: give a whole number, or None not to shuffle")
        self._task, self._rows, self._size, self._seed = task, some_rows(rows), size, seed
        self._epoch = self._taken = self._begin = 0

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = list(range(len(self._rows)))
        if self._seed is not None:
            Random(f"{self._seed} {self._epoch}").shuffle(order)
        begin, self._begin = self._begin, 0
        for place in range(begin, len(self)):
            self._taken = place + 1
            chosen = order[place * self._size : (place + 1) * self._size]
            yield self._task.batch([self._rows[index] for index in chosen])
        self._taken = 0

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch."""
        self._epoch, self._taken, self._begin = epoch, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the batches taken of it."""
        return {"epoch": self._epoch, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; raises InputError for one of other rows."""
        epoch, taken = state.get("epoch"), state.get("taken")
        if type(epoch) is not int or type(taken) is not int or not 0 <= taken <= len(self):
            raise InputError(
                f"{state!r} is no position in {len(self)} batches: give the rows that were trained on"
            )
        self._epoch, self._taken, self._begin = epoch, taken, taken
