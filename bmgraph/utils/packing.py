"""Packs documents of different lengths into full rows in which no document attends to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch

from bmgraph.errors import InputError

IGNORED = -100
OPEN_ROWS = 32
"""Rows with room left that a document is tried on."""

Part = tuple[int, int, int]
"""A document, and its tokens [start, stop) that lie in a row."""


@dataclass(eq=False)
class PackedBatches:
    """Batches [rows, length] of documents, each a sequence of token ids; read again in every epoch.

    `input_ids`, `labels` i64[rows, length] and `position_ids`, which begin at 0 in each document; `attention_mask`
    bool[rows, 1, length, length], true where a position may attend to another: to earlier ones of its document (or all of them,
    if not `causal`). Labels are the ids, as causal models of transformers take them, which shift them; a document's first token
    and padding are -100. With `shift` the label of a position is the next token, for models that do not shift. A document that is
    longer than a row is cut into parts that do not see each other. The last rows of an epoch are filled with padding.

    With a `seed` documents are shuffled, otherwise in each epoch. Several ranks with rows of their own (`Torch(batch="rank")`)
    give their `rank` and the number of `ranks`: each batch of rank r is the r-th of as many.

    Raises InputError if there is no document with 2 tokens or more, or a size is not positive.

    Example:
        >>> (batch,) = PackedBatches([[5, 6, 7], [8, 9]], length=6, rows=1)
        >>> batch["position_ids"].tolist(), batch["labels"].tolist()
        ([[0, 1, 2, 0, 1, 0]], [[-100, 6, 7, -100, 9, -100]])
    """

    documents: Sequence[Sequence[int]]
    length: int
    rows: int
    pad: int = 0
    causal: bool = True
    shift: bool = False
    seed: int | None = None
    rank: int = 0
    ranks: int = 1
    _epoch: int = field(default=0, init=False)
    _next: int = field(default=0, init=False)
    _begin: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for name in ("length", "rows", "ranks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: give 1 or more")
        if not any(len(document) > 1 for document in self.documents):
            raise InputError("there is no document with 2 tokens or more to train on")

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of documents."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and the batches given in it."""
        return {"epoch": self._epoch, "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._epoch, self._begin = int(state_dict["epoch"]), int(state_dict["next"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        packed = self._packed()
        self._next, self._begin = self._begin, 0
        size = self.rows * self.ranks
        while self._next * size < len(packed):
            begin = self._next * size + self.rank * self.rows
            self._next += 1
            yield self._batch(packed[begin : begin + self.rows])

    def _packed(self) -> list[list[Part]]:
        """The parts of documents in each row: the first open row with room takes a part."""
        order = list(range(len(self.documents)))
        if self.seed is not None:
            Random(f"{self.seed} {self._epoch}").shuffle(order)
        full: list[list[Part]] = []
        waiting: list[tuple[int, list[Part]]] = []
        for index in order:
            size = len(self.documents[index])
            for start in range(0, size, self.length):
                part = index, start, min(size, start + self.length)
                need = part[2] - start
                if need < 2:
                    continue
                place = next((i for i, (room, _) in enumerate(waiting) if room >= need), None)
                if place is None:
                    if len(waiting) == OPEN_ROWS:
                        full.append(waiting.pop(0)[1])
                    waiting.append((self.length, []))
                    place = len(waiting) - 1
                room, parts = waiting[place]
                parts.append(part)
                waiting[place] = room - need, parts
        return full + [parts for _, parts in waiting]

    def _batch(self, packed: list[list[Part]]) -> dict[str, torch.Tensor]:
        shape = self.rows, self.length
        ids, labels = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        positions, owners = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        for row, parts in enumerate(packed):
            end = 0
            for number, (index, start, stop) in enumerate(parts):
                begin, end = end, end + stop - start
                tokens = torch.as_tensor(self.documents[index][start:stop], dtype=torch.int64)
                ids[row, begin:end] = tokens
                positions[row, begin:end] = torch.arange(end - begin)
                owners[row, begin:end] = number
                if self.shift:
                    labels[row, begin : end - 1] = tokens[1:]
                else:
                    labels[row, begin + 1 : end] = tokens[1:]
        mask = owners[:, :, None] == owners[:, None, :]
        if self.causal:
            mask &= torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return {
            "input_ids": ids,
            "attention_mask": mask[:, None],
            "position_ids": positions,
            "labels": labels,
        }
