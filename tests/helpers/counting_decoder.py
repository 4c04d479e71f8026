"""A decoder without a model: its logits are drawn from what a row sees, so that a wrong mask, place or row changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bmgraph.ir.cache_spec import CacheSpec, Slot
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.generation.batching.held_positions import HeldPositions, joined
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.sampling import Array

IDS = 20


def cache_spec(limit: int | None = 64, in_place: bool = False, ends: str | None = None) -> CacheSpec:
    """A cache of one slot f[B, 2, P, 3], with a mask, positions and an input of one value per row."""
    whole = ("batch", "past + sequence")
    past = TensorSpec("past", torch.float32, ("batch", 2, "past", 3))
    return CacheSpec(
        tokens=TensorSpec("ids", torch.int64, ("batch", "sequence")),
        mask=TensorSpec("mask", torch.int64, whole),
        positions=TensorSpec("positions", torch.int64, ("batch", "sequence")),
        logits=TensorSpec("logits", torch.float32, ("batch", "scored", IDS)),
        slots=(Slot(past, TensorSpec("present", torch.float32, ("batch", 2, "total", 3)), 2, in_place),),
        memories=(),
        others=(TensorSpec("delta", torch.int64, ("batch",), names=("trec", "spam")),),
        limit=limit,
        scored=TensorSpec("scored", torch.int64, ("scored",)),
        ends=ends,
    )


def next_scores(seen: Sequence[int], delta: int) -> Array:
    """The logits f[IDS] after the ids and positions that a row sees."""
    return np.random.default_rng([delta + 1, *(int(item) + 1 for item in seen)]).normal(size=IDS)


class CountingState:
    """The ids and positions of rows, i64[B, T, 2]."""

    def __init__(self, decoder: CountingDecoder, rows: int) -> None:
        self._decoder, self.cells = decoder, np.zeros((rows, 0, 2), np.int64)
        self.reserved = (rows, 0)

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """The logits of each row."""
        new = np.stack([feeds["ids"], feeds["positions"]], -1)
        self.cells = np.concatenate([self.cells, np.full_like(new, 99) if "ends" in feeds else new], 1)
        mask = feeds["mask"]
        if "ends" in feeds:
            self.cells[range(len(new)), feeds["ends"]] = new[:, 0]
            assert (feeds["ends"] == mask.sum(1) - 1).all(), "rows do not end where their masks do"
        assert mask.shape == self.cells.shape[:2], "the mask is not as long as the cache"
        self._decoder.steps.append(new.shape[:2])
        if len(self._decoder.steps) in self._decoder.failing:
            raise RuntimeError(f"step {len(self._decoder.steps)} failed")
        return np.stack(
            [
                next_scores(row[kept == 1].reshape(-1).tolist(), int(delta))
                for row, kept, delta in zip(self.cells, mask, feeds["delta"])
            ]
        )

    def reorder(self, rows: Array) -> None:
        """As `DecodeState.reorder`."""
        self.cells = self.cells[rows]

    def reserve(self, rows: int, most: int) -> None:
        """Notes what is reserved, and that it is enough."""
        assert rows >= len(self.cells)
        assert most >= self.cells.shape[1]
        self.reserved = rows, most
        self._decoder.reserved.append((rows, most))

    def join(self, other: CountingState) -> None:
        """As `JoiningState.join`; what is padding is no id that anybody has."""
        longest = max(self.cells.shape[1], other.cells.shape[1])
        missing = [longest - cells.shape[1] for cells in (self.cells, other.cells)]
        apart = self._decoder.rows_end_apart
        padded = [
            np.pad(cells, ((0, 0), (0, count) if apart else (count, 0), (0, 0)), constant_values=99)
            for cells, count in zip((self.cells, other.cells), missing)
        ]
        self.cells = np.concatenate(padded)
        assert len(self.cells) <= self.reserved[0]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """As `JoiningState.keep_rows`."""
        self.cells = self.cells[list(rows)]

    def forget_front(self, count: int) -> None:
        """As `JoiningState.forget_front`."""
        assert not self._decoder.rows_end_apart
        self.cells = self.cells[:, count:]

    def forget(self, count: int) -> None:
        """As `JoiningState.forget`."""
        self.cells = self.cells[:, : self.cells.shape[1] - count]

    def positions(self, row: int, begin: int, end: int) -> HeldPositions:
        """As `JoiningState.positions`."""
        assert 99 not in self.cells[row, begin:end, 0], "what is kept is padding"
        self._decoder.copied += end - begin
        return HeldPositions((torch.from_numpy(self.cells[row : row + 1, begin:end].copy()),), (1,))

    def begin_with(self, parts: Sequence[HeldPositions]) -> None:
        """As `JoiningState.begin_with`."""
        assert self.cells.shape[:2] == (1, 0)
        self.cells = joined(parts)[0].numpy()


class CountingDecoder:
    """Gives such states; `steps` are the rows and new positions of each step, those with a number in `failing` fail. `apart`: joined
    rows begin at the first position."""

    no_joining = ""
    longest_encoded: int | None = None
    encoder_inputs: tuple[TensorSpec, ...] = ()

    def __init__(self, limit: int | None = 64, failing: Sequence[int] = (), apart: bool = False) -> None:
        self.cache = cache_spec(limit, ends="ends" if apart else None)
        self.rows_end_apart = apart
        self.steps: list[tuple[int, ...]] = []
        self.reserved: list[tuple[int, int]] = []
        self.failing = set(failing)
        self.copied = 0

    wide_form = None
    copies_all_rows = False
    encoded_in = 1

    def for_batching(self, wide: bool) -> CountingDecoder:
        """Itself."""
        return self

    def start(self, batch_size: int, encoder_feeds: Mapping[str, Array], most: int) -> Any:
        """An empty state."""
        return CountingState(self, batch_size)


def alone(prompt: Sequence[int], count: int, delta: int = 0) -> list[int]:
    """The greedy ids of a prompt by itself."""
    ids = list(prompt)
    for _ in range(count):
        seen = [value for place, item in enumerate(ids) for value in (item, place)]
        ids.append(int(next_scores(seen, delta).argmax()))
    return ids[len(prompt) :]


class CountingEngine(GeneratingEngine):
    """An engine over such a decoder, for tests of what stands above engines."""

    def __init__(self, limit: int | None = 64, failing: Sequence[int] = ()) -> None:
        self.counting = CountingDecoder(limit, failing)
        cache = self.counting.cache
        assert cache.mask is not None
        super().__init__((cache.tokens, cache.mask, *cache.others), (cache.logits,), {}, Report())

    def decoder(self) -> CountingDecoder:
        """The decoder."""
        return self.counting

    def __call__(self, **batch: object) -> dict[str, torch.Tensor]:
        """It only generates."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """It is not saved."""
        raise NotImplementedError
