"""Prompts that begin like texts that were read: only the rest is read, with the ids that each request has alone, in bounded memory."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.passes import Deltas
from bmgraph.runtime.generation.batching.held_positions import HeldPositions
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.prefix_tree import PrefixTree
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from tests.helpers.counting_decoder import CountingDecoder, alone
from tests.helpers.decoder_forms import FORMS, engine_of_form
from tests.helpers.models import tokens
from tests.helpers.rotary_decoder import rotary_decoder
from tests.passes.test_per_row_deltas import two_deltas
from tests.runtime.generation.batching.test_scheduler import POSITION, request, rounds
from tests.runtime.generation.batching.test_submit import check_alone


def held(kind: int, ids: list[int]) -> Any:
    """Gives positions that tell what led to them."""
    values = [hash((kind, *ids[: place + 1])) for place in range(len(ids))]
    return lambda begin, end: HeldPositions((torch.tensor([values[begin:end]]),), (1,))


TEXTS = st.lists(
    st.tuples(st.integers(0, 1), st.lists(st.integers(0, 2), min_size=1, max_size=12)),
    min_size=1,
    max_size=40,
)


@settings(max_examples=40)
@given(TEXTS, st.integers(1, 40))
def test_the_tree_gives_what_led_to_each_position_within_its_bound(texts: Any, most: int) -> None:
    tree = PrefixTree(most)
    for number, (kind, ids) in enumerate(texts):
        parts = tree.find(kind, ids)
        found = torch.cat([part.values[0] for part in parts], 1)[0].tolist() if parts else []
        assert found == held(kind, ids)(0, len(found)).values[0][0].tolist()
        tree.keep(kind, ids, held(kind, ids))
        assert tree.held <= most
        assert sum(map(len, tree.find(kind, ids))) == min(len(ids), most)
        if number and sum(len(item) for _, item in texts[: number + 1]) <= most:  # nothing had to go
            for other, earlier in texts[:number]:
                assert sum(map(len, tree.find(other, earlier))) == len(earlier)
    tree.clear()
    assert (tree.held, tree.find(*texts[0])) == (0, [])


ASKED = st.lists(
    st.tuples(
        st.integers(0, 3),  # the text that it begins with
        st.lists(st.integers(0, 19), max_size=8),  # what follows
        st.integers(1, 20),  # new tokens
        st.integers(0, 1),  # delta
        st.integers(0, 6),  # rounds before it comes
        st.booleans(),  # whether it goes on behind an answer that is there
        st.one_of(st.none(), st.none(), st.integers(0, 9)),  # cancelled before it
    ),
    min_size=1,
    max_size=20,
)


@settings(max_examples=15)
@given(
    ASKED,
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(0, 120),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_requests_with_shared_beginnings_have_the_ids_that_they_have_alone(
    asked: Any, rows: int, prefill: int, kept: int, draw: Any, apart: bool
) -> None:
    decoder = CountingDecoder(apart=apart)
    bound = Batching(
        rows=rows, prefill=prefill, cache_bytes=(300 + kept) * POSITION, prefix_bytes=kept * POSITION
    )
    scheduler = Scheduler(decoder, bound)
    starts = [[draw.randrange(20) for _ in range(draw.randint(1, 25))] for _ in range(4)]
    made: list[Any] = []
    for start, rest, count, delta, wait, goes_on, cancelled in asked:
        for _ in range(wait):
            scheduler.round()
            assert scheduler.load.kept <= kept
        prompt = [*starts[start], *rest]
        if goes_on and made:
            prompt = [*made[-1][1], *made[-1][0].so_far.ids, *rest][:40]
        made.append((request(prompt, count, delta), prompt, count, delta))
        scheduler.submit(made[-1][0])
        if cancelled is not None:
            made[-1 - cancelled % len(made)][0].cancel()
    rounds(scheduler)
    read = sum(rows * new for rows, new in decoder.steps)
    spared = 0
    for item, prompt, count, delta in made:
        found = item.result(0)
        assert list(found.ids) == alone(prompt, count, delta)[: len(found.ids)]
        assert item.finish_reason in ("length", "cancelled")
        assert 0 <= found.cached_tokens <= len(prompt)
        spared += found.cached_tokens
    if all(item.finish_reason == "length" for item, *_ in made):
        assert read == sum(len(prompt) + count - 1 for _, prompt, count, _ in made) - spared
    assert spared == 0 or kept


def test_answers_to_one_prompt_read_it_once() -> None:
    decoder = CountingDecoder()
    scheduler = Scheduler(decoder, Batching(cache_bytes=2000 * POSITION))
    made = [request([1, 2, 3, 4], 3, temperature=1.0, seed=number) for number in range(5)]
    for item in made:
        scheduler.submit(item)
    rounds(scheduler)
    assert decoder.steps == [(1, 4), (5, 1), (5, 1)]
    assert [item.result(0).cached_tokens for item in made] == [0, 4, 4, 4, 4]
    later = request([1, 2, 3, 4], 3, temperature=1.0, seed=0)
    other = request([1, 2, 3], 1)
    for item in (other, later):
        scheduler.submit(item)
    rounds(scheduler)
    assert (other.cached, later.cached) == (2, 3)  # the logits after it are not kept
    assert later.result(0).ids == made[0].result(0).ids


def test_a_conversation_reads_what_is_new_alone() -> None:
    decoder = CountingDecoder()
    scheduler = Scheduler(decoder, Batching(cache_bytes=2000 * POSITION))
    text, copied = [1, 2, 3], 0
    for turn in range(4):
        asked = request([*text, turn], 5)
        scheduler.submit(asked)
        rounds(scheduler)
        assert asked.cached == max(len(text) - 1, 0) * bool(turn)  # no step read the last id of an answer
        text = [*text, turn, *asked.result(0).ids]
        copied = decoder.copied
    assert copied == len(text) - 1  # each position once


def test_what_failed_or_is_of_another_delta_is_not_reused() -> None:
    decoder = CountingDecoder(failing=[3])
    scheduler = Scheduler(decoder, Batching(cache_bytes=2000 * POSITION))
    first, second = request([1, 2, 3], 9), request([1, 2, 3, 4], 2, delta=1)
    scheduler.submit(first)
    rounds(scheduler)
    assert isinstance(first.error, RuntimeError)
    scheduler.submit(second)
    rounds(scheduler)
    assert (second.cached, list(second.result(0).ids)) == (0, alone([1, 2, 3, 4], 2, 1))


def test_memory_that_runs_out_is_taken_from_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.counting_decoder import CountingState

    def none_left(*_: object) -> Any:
        raise MemoryError

    scheduler = Scheduler(CountingDecoder(), Batching(cache_bytes=2000 * POSITION))
    scheduler.submit(request([1, 2, 3], 2))
    rounds(scheduler)
    assert scheduler.load.kept == 4
    monkeypatch.setattr(CountingState, "positions", none_left)
    last = request([5], 3)
    scheduler.submit(last)
    rounds(scheduler)
    assert (list(last.result(0).ids), scheduler.load.kept) == (alone([5], 3), 0)


def test_what_is_kept_is_part_of_the_cache() -> None:
    assert Batching(cache_bytes=4000).positions(10) == (300, 100)
    assert Batching(cache_bytes=4000, prefix_bytes=0).positions(10) == (400, 0)
    with pytest.raises(InputError, match="prefix_bytes=-1: give a whole number of 0 or more"):
        Batching(prefix_bytes=-1)
    with pytest.raises(InputError, match="prefix_bytes=10 is all that cache_bytes=10 allows"):
        Batching(cache_bytes=10, prefix_bytes=10)


def shared(count: int, vocabulary: int = 50, longest: int = 34, seed: int = 0) -> list[dict[str, Any]]:
    """Requests that begin with one of a few texts, some with the same prompt."""
    draw = random.Random(seed)
    starts = [[draw.randrange(vocabulary) for _ in range(draw.randint(3, 18))] for _ in range(3)]
    found: list[dict[str, Any]] = []
    for number in range(count):
        prompt = [*draw.choice(starts), *(draw.randrange(vocabulary) for _ in range(draw.randint(0, 6)))]
        if found and draw.random() < 0.3:
            prompt = draw.choice(found)["prompt"]
        sampled = {"temperature": 1.0, "seed": number} if draw.random() < 0.3 else {}
        found.append(
            {"prompt": prompt, "max_new_tokens": min(draw.randint(1, 12), longest - len(prompt)), **sampled}
        )
    return found


def check(engine: Any, wanted: list[dict[str, Any]]) -> None:
    """All at once and then once more; the ids are those alone, and many were not read again."""
    for _ in range(2):
        found = [item.result(60) for item in [engine.submit(**item) for item in wanted]]
        check_alone(engine, wanted, [item.ids for item in found])
    assert sum(item.cached_tokens for item in found) > sum(item.prompt_tokens for item in found) // 2


@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_engines(backend: str) -> None:
    made = bg.compile(
        rotary_decoder(),
        example=tokens(),
        backend=Onnx(generate=True, threads=1) if backend == "onnx" else Torch(generate=True),
    )
    made.batching = Batching(rows=4, prefill=8)
    try:
        check(made, shared(12))
        prompt = [3, 1, 4, 1, 5, 9, 2, 6]
        asked = (
            prompt,
            prompt,
            [*prompt, 7],
            prompt,
        )  # read whole, not read, read in part, the last id alone
        scores = [made.submit(item, max_new_tokens=4, logprobs=3).result(60) for item in asked]
        assert [item.cached_tokens for item in scores] == [0, 8, 8, 7]
        values = [[value for score in item.scores for _, value in score.top] for item in scores]
        assert np.abs(np.subtract(values[0], values[3])).max() < 1e-4
    finally:
        made.stop_batching()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_decoders(name: str, backend: str) -> None:
    made = engine_of_form(name, backend)
    check(made, shared(40))
    made.stop_batching()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_a_delta_in_the_place_of_another_reads_anew(tmp_path: Any, backend: str) -> None:
    program = bg.capture(rotary_decoder(), tokens())
    folders = two_deltas(program, tmp_path)
    made = bg.compile(
        program, [Deltas(("trec", "spam"))], resources=folders,
        backend=Onnx(generate=True, threads=1) if backend == "onnx" else Torch(generate=True),
    )  # fmt: skip
    prompt = [3, 14, 15, 9, 2, 6]
    asked = {"prompt": prompt, "max_new_tokens": 8, "delta": "trec"}
    first = [made.submit(**asked).result(60) for _ in range(2)]
    assert first[0].ids == first[1].ids
    assert first[1].cached_tokens == 6
    spam = made.submit(**{**asked, "delta": "spam"}).result(60)
    assert spam.cached_tokens == 0
    made.deltas.swap("trec", folders["spam"])  # all entries are taken: the same one is written
    swapped = made.submit(**asked).result(60)
    assert (swapped.cached_tokens, swapped.ids) == (0, spam.ids)
    assert swapped.ids != first[0].ids
    made.stop_batching()
