"""Rows that end apart: taken where a step gives them the logits that they have with padding in front, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.ends_check import rows_may_end_apart
from tests.helpers.counting_decoder import CountingDecoder, CountingState, next_scores


class BySize(CountingState):
    """Sees how far ids are from the last position of all rows, as a model does that numbers positions by the size of its mask."""

    def step(self, feeds: Mapping[str, Array]) -> Array:
        """The logits of each row."""
        super().step(feeds)
        total = self.cells.shape[1]
        return np.stack(
            [
                next_scores([value for place in np.flatnonzero(kept) for value in (cells[place, 0], total - place)], 0)
                for cells, kept in zip(self.cells, feeds["mask"])
            ]
        )  # fmt: skip


@pytest.mark.parametrize(("state", "fits"), [(CountingState, True), (BySize, False)])
@pytest.mark.parametrize("limit", [None, 64, 5])
def test_rows_end_apart_where_that_changes_nothing(state: Any, fits: bool, limit: int | None) -> None:
    decoders = {apart: CountingDecoder(limit, apart=apart) for apart in (False, True)}
    assert rows_may_end_apart(decoders[True].cache, lambda apart: state(decoders[apart], 1)) == fits


def test_two_positions_are_needed() -> None:
    decoder = CountingDecoder(2, apart=True)
    assert not rows_may_end_apart(decoder.cache, lambda apart: CountingState(decoder, 1))
