"""Rows of a cache that join, leave and move: what each row holds stays what it was, in slots in place and in those that grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.runtime.ort.cache_memory import ALIGNED, CacheMemory
from tests.helpers.counting_decoder import cache_spec

Array = np.ndarray[Any, Any]

EDITS = st.lists(
    st.tuples(st.sampled_from(["join", "keep", "front", "append", "reserve", "repeat"]), st.integers(0, 999)),
    max_size=12,
)


def filled(in_place: bool, rows: int, positions: int, seed: int) -> CacheMemory:
    """A memory that holds random numbers."""
    memory = CacheMemory(cache_spec(in_place=in_place), rows, "cpu", 40)
    append(memory, np.random.default_rng(seed).normal(size=(rows, 2, positions, 3)).astype(np.float32))
    return memory


def append(memory: CacheMemory, values: Array) -> None:
    """What a run does: write new positions behind those that are there."""
    before = memory.held
    memory.make_room(values.shape[2])
    if memory.grows:
        whole = np.concatenate([memory._values["past"].numpy(), values], 2)
        memory.keep([memory._value(whole)])
    else:
        memory._arrays["past"][: memory.rows, :, before : memory.held] = values


def held(memory: CacheMemory) -> Array:
    if memory.grows:
        return memory._values["past"].numpy()
    return memory._arrays["past"][: memory.rows, :, : memory.held]


@settings(max_examples=25)
@given(EDITS, st.booleans(), st.integers(1, 3), st.integers(1, 9))
def test_edits_are_those_of_a_plain_array(
    edits: list[tuple[str, int]], in_place: bool, rows: int, positions: int
) -> None:
    memory = filled(in_place, rows, positions, 0)
    expected = held(memory).copy()
    for edit, number in edits:
        random = np.random.default_rng(number)
        if edit == "join" and len(expected) < 8:
            other = filled(in_place, 1 + number % 2, 1 + number % 13, number)
            longest = max(memory.held, other.held)
            both = [
                np.pad(item, ((0, 0), (0, 0), (longest - item.shape[2], 0), (0, 0)))
                for item in (expected, held(other))
            ]
            memory.join(other)
            expected = np.concatenate(both)
        elif edit == "keep":
            chosen = random.permutation(len(expected))[: 1 + number % len(expected)].tolist()
            memory.keep_rows(chosen)
            expected = expected[chosen]
        elif edit == "front" and memory.held > 1:
            count = number % memory.held
            memory.forget_front(count)
            expected = expected[:, :, count:]
        elif edit == "append":
            values = random.normal(size=(len(expected), 2, 1, 3)).astype(np.float32)
            append(memory, values)
            expected = np.concatenate([expected, values], 2)
        elif edit == "reserve":
            memory.reserve(len(expected) + number % 4, memory.held + number % 30)
        elif edit == "repeat" and len(expected) < 8:
            memory.repeat_rows(1 + number % 3)
            expected = expected.repeat(1 + number % 3, 0)
        assert memory.held == expected.shape[2]
        assert np.array_equal(held(memory), expected)


def test_a_place_that_held_no_number_is_clean_for_the_next_row() -> None:
    memory = filled(True, 1, 6, 0)
    memory.reserve(2, 40)
    broken = filled(True, 1, 6, 1)
    broken._arrays["past"][:] = np.nan
    memory.join(broken)
    memory.keep_rows([0])
    memory.join(filled(True, 1, 2, 2))
    assert np.isfinite(held(memory)).all()


def test_what_is_reserved_grows_while_few_rows_are_there() -> None:
    memory = filled(True, 1, 2, 0)
    expected = held(memory).copy()
    memory.reserve(4, 300)
    reserved = memory._arrays["past"]
    memory.make_room(255)
    assert memory._arrays["past"] is reserved
    memory.forget(255)
    np.testing.assert_array_equal(held(memory), expected)


def test_what_is_reserved_is_aligned_and_takes_no_memory_yet() -> None:
    resource = pytest.importorskip("resource")
    memory = filled(True, 1, 2, 0)
    memory.reserve(1, 10**8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory.reserve(500_000, 10**8)
    memory.make_room(4)
    assert memory._arrays["past"].nbytes > 2**28
    assert memory._arrays["past"].ctypes.data % ALIGNED == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB
