"""Requests that join and leave: the ids that each has alone, within rows and memory, whatever the others do or run into."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmgraph.errors import BackendError, BusyError, InputError
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from bmgraph.runtime.generation.sampling import Sampler, Sampling
from tests.helpers.counting_decoder import CountingDecoder, alone

POSITION = 2 * 3 * 4
"""Bytes of a position of a row in the cache."""


def request(prompt: Sequence[int], count: int, delta: int = 0, **options: Any) -> Request:
    sampler = Sampler(Sampling(**options), 1, [prompt])
    return Request(prompt, count, sampler, (), {"delta": np.array([delta])}, None)


def rounds(scheduler: Scheduler, most: int = 10_000) -> int:
    """Make rounds until there is nothing to do; returns how many."""
    for count in range(most):
        if not scheduler.round():
            return count + 1
    raise AssertionError("there is no end")


ASKED = st.lists(
    st.tuples(
        st.lists(st.integers(0, 19), min_size=1, max_size=30),  # prompt
        st.integers(1, 30),  # new tokens
        st.integers(0, 3),  # delta
        st.integers(0, 3),  # rounds before it comes
        st.one_of(st.none(), st.none(), st.integers(0, 9)),  # the ids after which it is cancelled
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=10)
@given(ASKED, st.integers(1, 6), st.integers(1, 40), st.integers(120, 400), st.booleans())
def test_each_request_has_the_ids_that_it_has_alone(
    asked: list[Any], rows: int, prefill: int, positions: int, apart: bool
) -> None:
    decoder = CountingDecoder(apart=apart)
    scheduler = Scheduler(decoder, Batching(rows=rows, prefill=prefill, cache_bytes=positions * POSITION))
    made = []
    for prompt, count, delta, wait, cancelled in asked:
        for _ in range(wait):
            scheduler.round()
        made.append(request(prompt, count, delta))
        scheduler.submit(made[-1])
        if cancelled is not None:
            target = made[-1 - cancelled % len(made)]
            target.cancel()
    rounds(scheduler)
    for item, (prompt, count, delta, *_) in zip(made, asked):
        found = item.result(0)
        expected = alone(prompt, count, delta)
        if item.finish_reason == "length":
            assert list(found.ids) == expected
        else:
            assert item.finish_reason == "cancelled"
            assert list(found.ids) == expected[: len(found.ids)]
    for count, new in decoder.steps:
        assert count <= rows
        assert new == 1 or (count == 1 and new <= prefill)
    assert all((kept + 1) * most <= positions for kept, most in decoder.reserved)
    assert scheduler.load.running == scheduler.load.waiting == scheduler.load.positions == 0


def test_drawn_ids_do_not_depend_on_neighbours() -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.3}
    prompts = [[3, 4], [5], [6, 7, 8, 9]]
    found = []
    for rows in (1, 3):
        scheduler = Scheduler(CountingDecoder(), Batching(rows=rows))
        made = [request(prompt, 12, seed=seed, **options) for seed, prompt in enumerate(prompts)]
        for item in made:
            scheduler.submit(item)
        rounds(scheduler)
        found.append([item.result(0).ids for item in made])
    assert found[0] == found[1]


def test_prompts_are_read_in_chunks_between_steps() -> None:
    decoder = CountingDecoder()
    scheduler = Scheduler(decoder, Batching(prefill=8))
    scheduler.submit(request([1], 20))
    scheduler.round()
    scheduler.submit(request([2] * 20, 4))
    rounds(scheduler)
    assert decoder.steps[:8] == [(1, 1), (1, 1), (1, 8), (1, 1), (1, 8), (1, 1), (1, 4), (2, 1)]


def test_a_prompt_is_not_cut_for_what_another_one_leaves_of_a_round() -> None:
    decoder = CountingDecoder()
    scheduler = Scheduler(decoder, Batching(prefill=8, prefix_bytes=0))
    for length in (5, 6, 2, 20):
        scheduler.submit(request([2] * length, 9))
    rounds(scheduler)
    first = [(1, 5), (1, 1), (1, 6), (1, 2), (3, 1), (1, 8), (3, 1), (1, 8), (3, 1), (1, 4), (4, 1)]
    assert decoder.steps[: len(first)] == first


def test_a_request_that_is_somewhat_longer_has_the_memory_that_there_is() -> None:
    decoder = CountingDecoder()
    scheduler = Scheduler(decoder, Batching(rows=4, cache_bytes=5 * 300 * POSITION, prefix_bytes=0))
    for count in (10, 20, 30, 40):
        scheduler.submit(request([2] * 3, count))
    rounds(scheduler)
    assert decoder.reserved == [(4, 256)]
    decoder.reserved.clear()
    tight = Scheduler(decoder, Batching(rows=4, cache_bytes=5 * 50 * POSITION, prefix_bytes=0))
    for count in (10, 20):
        tight.submit(request([2] * 3, count))
    rounds(tight)
    assert decoder.reserved == [(4, 50)]


def test_what_is_full_says_so() -> None:
    scheduler = Scheduler(CountingDecoder(), Batching(rows=1, waiting=2, cache_bytes=80 * POSITION))
    first = request([1, 2], 10)
    scheduler.submit(first)
    scheduler.round()
    others = [request([3], 2), request([4], 2)]
    for item in others:
        scheduler.submit(item)
    assert (scheduler.load.running, scheduler.load.waiting) == (1, 2)
    with pytest.raises(BusyError, match="2 requests wait for this engine, as many as may: try again later"):
        scheduler.submit(request([5], 2))
    with pytest.raises(
        InputError, match=r"may come to 42 positions, .* of cache .* there are 0\.0 MB: ask for fewer"
    ):
        scheduler.submit(request([1, 2], 40))
    others[0].cancel()
    scheduler.round()
    scheduler.submit(request([5], 2))
    rounds(scheduler)
    assert others[0].result(0).ids == ()
    assert list(others[1].result(0).ids) == alone([4], 2)


def test_a_step_that_fails_ends_those_that_run_with_its_error() -> None:
    scheduler = Scheduler(CountingDecoder(failing=[3]), Batching(rows=2))
    made = [request([1], 8), request([2], 8), request([3], 3)]
    for item in made:
        scheduler.submit(item)
    rounds(scheduler)
    for item in made[:2]:
        assert item.finish_reason == "error"
        with pytest.raises(RuntimeError, match="step 3 failed"):
            item.result(0)
        with pytest.raises(RuntimeError, match="step 3 failed"):
            list(item)
    assert list(made[2].result(0).ids) == alone([3], 3)


def test_a_prompt_that_fails_or_a_row_without_ids_ends_alone() -> None:
    scheduler = Scheduler(CountingDecoder(failing=[1]), Batching())
    nothing = {item: float("-inf") for item in range(20)}
    made = [request([1], 8), request([2], 5), request([3], 3, logit_bias=nothing)]
    for item in made:
        scheduler.submit(item)
    rounds(scheduler)
    assert isinstance(made[0].error, RuntimeError)
    assert list(made[1].result(0).ids) == alone([2], 5)
    with pytest.raises(InputError, match="no id is left to choose"):
        made[2].result(0)


def test_the_thread_serves_waits_and_ends() -> None:
    scheduler = Scheduler(CountingDecoder(limit=None), Batching(rows=3))
    scheduler.start()
    made = [request([item], 6) for item in range(8)]
    for item in made:
        scheduler.submit(item)
    assert [list(item) for item in made] == [alone([item], 6) for item in range(8)]
    endless = request([1], 10**6)
    scheduler.submit(endless)
    pieces = iter(endless)
    first = [next(pieces) for _ in range(3)]
    assert first == alone([1], 3)
    with pytest.raises(TimeoutError, match="did not end within"):
        endless.result(0.01)
    endless.cancel()
    assert endless.result(30).finish_reason == "cancelled"
    last = request([1], 10**6)
    scheduler.submit(last)
    scheduler.stop()
    with pytest.raises(BackendError, match="the engine was stopped before the answer ended"):
        last.result(30)
    with pytest.raises(BackendError, match="the engine was stopped"):
        scheduler.submit(request([1], 2))
    assert not any(thread.name == "bmgraph-batching" for thread in threading.enumerate())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_no_part_in_it() -> None:
    scheduler = Scheduler(CountingDecoder(limit=None), Batching())
    scheduler.start()
    scheduler.submit(request([1], 10**6))
    child = os.fork()
    if not child:
        scheduler.stop()
        os._exit(3 if scheduler.is_foreign else 4)
    begin = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert time.monotonic() - begin < 60
    scheduler.stop()


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"waiting": 0}, {"cache_bytes": 0}, {"prefill": 0}, {"rows": 1.5}]
)
def test_limits_are_whole_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}=.*: give a whole number"):
        Batching(**options)


@pytest.mark.slow
@settings(max_examples=25)
@given(st.randoms(use_true_random=False))
def test_two_hundred_requests(random: Any) -> None:
    asked = [
        (
            [random.randrange(20) for _ in range(random.randint(1, 30))], random.randint(1, 30), random.randrange(4),
            random.choice([0, 0, 0, 1, 5]), random.choice([None] * 8 + [0, 5]),
        )
        for _ in range(200)
    ]  # fmt: skip
    test_each_request_has_the_ids_that_it_has_alone.hypothesis.inner_test(
        asked, random.randint(1, 16), 16, 400, random.random() < 0.5
    )  # type: ignore[attr-defined]
