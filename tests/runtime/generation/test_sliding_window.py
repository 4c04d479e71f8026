"""Windows that slide: what each step reads, against a loop that reads the kept ids anew for every token; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmgraph as bg
from bmgraph.backends import Onnx, OpenVINO, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from bmgraph.runtime.generation.sampling import Sampler, Sampling
from bmgraph.runtime.generation.sliding_window import SlidingWindow
from bmgraph.runtime.generation.tokenizer import tokenizer_of
from tests.helpers.counting_decoder import IDS, CountingDecoder, CountingEngine, next_scores
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.rotary_decoder import rotary_decoder

PROMPTS = ([3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2])


def counted(prompt: Sequence[int], count: int, size: int, keep: int, delta: int = 0) -> list[int]:
    """The greedy ids of a `CountingDecoder`, whose every step reads what a window has of the text."""
    view, found = list(prompt), []
    for _ in range(count):
        if len(view) > size:
            view = view[:keep] + view[-((size - keep) // 2) :]
        seen = [value for place, item in enumerate(view) for value in (item, place)]
        found.append(int(next_scores(seen, delta).argmax()))
        view.append(found[-1])
    return found


def read_anew(program: Program, prompt: Sequence[int], count: int, size: int, keep: int = 0) -> list[int]:
    """The same of a program, without a cache."""
    view, found = list(prompt), []
    for _ in range(count):
        if len(view) > size:
            view = view[:keep] + view[-((size - keep) // 2) :]
        batch = torch.tensor([view])
        logits = program(ids=batch, attention_mask=torch.ones_like(batch))["output"]
        found.append(int(logits[0, -1].argmax()))
        view.append(found[-1])
    return found


@given(
    prompts=st.lists(st.lists(st.integers(0, IDS - 1), min_size=1, max_size=12), min_size=1, max_size=3),
    size=st.integers(2, 10),
    keep=st.integers(0, 8),
    count=st.integers(1, 25),
)
def test_each_row_reads_what_its_own_window_holds(
    prompts: list[list[int]], size: int, keep: int, count: int
) -> None:
    """Prompts may be longer than the window; rows slide at different times, and no neighbour changes them."""
    keep = min(keep, size - 2)
    engine = CountingEngine(limit=10)
    deltas = [None, "trec", "spam"][: len(prompts)]
    found = engine.generate(prompts, delta=deltas, window=size, keep=keep, max_new_tokens=count)
    assert found == [counted(prompt, count, size, keep, delta) for delta, prompt in enumerate(prompts)]
    assert max(new for _, new in engine.counting.steps) <= size


def test_a_slide_comes_once_in_half_a_window() -> None:
    engine = CountingEngine(limit=32)
    engine.generate([3, 4], window=True, max_new_tokens=200)
    read = [new for _, new in engine.counting.steps]
    assert read == [2, *[1] * 30, *([16, *[1] * 16] * 10 + [16])[: 200 - 31]]


def test_rows_that_have_ended_are_not_read_again() -> None:
    engine = CountingEngine(limit=8)
    alone = counted(PROMPTS[0], 40, 8, 0)
    end = alone[0]
    rows = engine.generate([PROMPTS[0], PROMPTS[1]], window=True, max_new_tokens=30, eos=end)
    other = counted(PROMPTS[1], 30, 8, 0)
    assert rows == [[], other[: other.index(end)] if end in other else other]


SUBMITTED = st.lists(
    st.tuples(
        st.lists(st.integers(0, IDS - 1), min_size=1, max_size=20),  # prompt
        st.integers(1, 30),  # new tokens
        st.one_of(st.none(), st.tuples(st.integers(2, 16), st.integers(0, 6))),  # window and keep
        st.integers(0, 3),  # rounds before it comes
        st.booleans(),  # whether the one before it is cancelled
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=15)
@given(SUBMITTED, st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 100))
def test_requests_slide_beside_others(
    asked: list[Any], rows: int, prefill: int, apart: bool, prefixes: int
) -> None:
    """They leave the batch, are read again, and join it; each has the ids that it has alone, within the cache that there is."""
    decoder, made, position = CountingDecoder(apart=apart), list[Request](), 2 * 3 * 4
    options = Batching(
        rows=rows, prefill=prefill, cache_bytes=300 * position, prefix_bytes=prefixes * position
    )
    scheduler = Scheduler(decoder, options)
    for prompt, count, window, wait, cancels in asked:
        for _ in range(wait):
            scheduler.round()
        slides = None if window is None else SlidingWindow(window[0], min(window[1], window[0] - 2))
        sampler, delta = Sampler(Sampling(), 1, [prompt]), {"delta": np.array([0])}
        made.append(Request(prompt, count, sampler, (), delta, None, window=slides))
        scheduler.submit(made[-1])
        if cancels and len(made) > 1:
            made[-2].cancel()
    for _ in range(10_000):
        if not scheduler.round():
            break
    for item, (prompt, count, window, *_) in zip(made, asked):
        size, keep = window or (1000, 0)
        expected = counted(prompt, count, size, min(keep, size - 2))
        found = list(item.result(0).ids)
        assert item.finish_reason in ("length", "cancelled")
        assert found == (expected if item.finish_reason == "length" else expected[: len(found)])
        assert item.result(0).cached_tokens <= min(len(prompt), size)
    assert all(kept <= rows for kept, _ in decoder.steps)
    assert all((kept + 1) * most <= 300 for kept, most in decoder.reserved)
    load = scheduler.load
    assert (load.running, load.waiting, load.positions) == (0, 0, 0)


def test_submit_takes_a_window() -> None:
    engine = CountingEngine(limit=16)
    try:
        asked = [{"window": True, "keep": 2}, {"window": 9}, {"max_new_tokens": 4}]
        made = [engine.submit(PROMPTS[2], **{"max_new_tokens": 90, **options}) for options in asked]
        expected = [
            counted(PROMPTS[2], 90, 16, 2),
            counted(PROMPTS[2], 90, 9, 0),
            counted(PROMPTS[2], 4, 16, 0),
        ]
        assert [list(request.result(60).ids) for request in made] == expected
        assert list(made[0]) == expected[0]
        with pytest.raises(InputError, match="window=17 is more than the 16 positions"):
            engine.submit([1], window=17)
    finally:
        engine.stop_batching()


def test_options_see_the_whole_text() -> None:
    """Penalties, samples, scores, pieces and stops go on where the window slides."""
    engine = CountingEngine(limit=8)
    options: dict[str, Any] = {"window": True, "keep": 1, "max_new_tokens": 20}
    plain = counted(PROMPTS[0], 20, 8, 1)
    assert list(engine.generate(PROMPTS[0], stream=True, **options)) == plain
    scored = engine.generate(PROMPTS[0], logprobs=0, **options)
    assert (list(scored.ids), scored.finish_reason, scored.prompt_tokens) == (plain, "length", 5)
    assert scored.scores is not None
    assert len(scored.scores) == 20

    once = engine.generate([0], no_repeat_ngram_size=1, **{**options, "max_new_tokens": IDS - 1})
    assert sorted([0, *once]) == list(range(IDS)), "an id came again that the window had forgotten"

    drawn = {**options, "temperature": 1.0, "seed": 3}
    both = engine.generate([PROMPTS[1], PROMPTS[0]], **{**drawn, "seed": [1, 3]})
    assert both[1] == engine.generate(PROMPTS[0], **drawn)
    several = engine.generate(PROMPTS[0], n=3, **drawn)
    assert several[0] == both[1]
    assert len({tuple(ids) for ids in several}) == 3

    whole = torch.tensor([PROMPTS[0]])
    tensor = engine.generate(input_ids=whole, max_new_tokens=20, window=True, keep=1)
    assert tensor[0, 5:].tolist() == plain
    assert engine.generate(input_ids=whole, window=8).shape == (1, 5 + 20)

    class Letters:
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return [ord(letter) - 97 for letter in text]

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(chr(97 + item) for item in ids)

    engine.tokenizer = tokenizer_of(Letters())
    text = Letters().decode(plain)
    stop = text[14:17]
    assert engine.generate(PROMPTS[0], stop=stop, **options) == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 65}, "window=65 is more than the 64 positions of this model"),
        ({"window": 1}, "window=1 with keep=0: two tokens or more must be left to slide"),
        ({"window": 8, "keep": 7}, "window=8 with keep=7: two tokens or more"),
        ({"window": 8, "keep": -1}, "keep=-1: give how many of the first tokens stay"),
        ({"window": -3}, "window=-3 with keep=0: two tokens"),
        ({"window": 2.5}, "window=2.5: give a whole number"),
        ({"window": "all"}, "window='all': give a whole number"),
        ({"keep": 4}, "keep=4 is for texts that slide: give window=, too"),
        ({"window": True, "num_beams": 2}, "window with num_beams or speculate"),
        ({"window": True, "speculate": True}, "window with num_beams or speculate"),
        ({"max_new_tokens": 99}, r"or let the oldest tokens go \(window=True, --window 0\)"),
    ],
)  # fmt: skip
def test_what_a_window_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CountingEngine(limit=64).generate([1, 2], **options)


def test_a_model_without_a_bound_needs_a_number() -> None:
    engine = CountingEngine(limit=None)
    with pytest.raises(InputError, match="no bound on positions; give how many"):
        engine.generate([1], window=True)
    assert engine.generate([1], window=8, max_new_tokens=30) == counted([1], 30, 8, 0)
    engine.generate([1], window=8, max_new_tokens=10**9, eos=range(IDS))  # no memory for all of it


def test_kept_is_the_beginning_and_the_newest_half() -> None:
    window = SlidingWindow(9, 2)
    assert window.kept(range(9)) == list(range(9))
    assert window.kept(np.arange(20).tolist()) == [0, 1, 17, 18, 19]
    assert (window.positions(3, 4), window.positions(3, 40), window.positions(30, 1)) == (7, 9, 9)


FORMS = [
    *((backend, form) for backend in ("onnx", "torch") for form in ("window", "bias", "rotary")),
    ("openvino", "rotary"),
    ("openvino", "learned positions"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "form"), FORMS)
def test_engines_read_what_is_kept_as_a_program_reads_it(backend: str, form: str) -> None:
    model = {
        "window": lambda: rotary_decoder(window=3),
        "bias": lambda: rotary_decoder(bias=True),
        "rotary": rotary_decoder,
    }
    program = bg.capture(model.get(form, tiny_decoder)(), tokens())  # type: ignore[operator]
    if backend == "openvino":
        pytest.importorskip("openvino")
    kinds: dict[str, Any] = {"onnx": Onnx, "torch": Torch, "openvino": OpenVINO}
    engine = bg.compile(program, backend=kinds[backend](generate=True))
    found = engine.generate(PROMPTS, window=12, keep=2, max_new_tokens=60)
    assert found == [read_anew(program, prompt, 60, 12, 2) for prompt in PROMPTS]
    assert engine.generate(PROMPTS[0], window=5, max_new_tokens=20) == read_anew(program, PROMPTS[0], 20, 5)
