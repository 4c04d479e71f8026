"""`engine.submit` on real engines: ids as alone, deltas by request, scores, texts and stops, what is refused, and the end of the thread."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, Quantize
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.request import Request
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from bmgraph.runtime.generation.tokenizer import tokenizer_of
from tests.helpers.captured import captured
from tests.helpers.counting_decoder import CountingEngine, alone
from tests.helpers.decoder_forms import FORMS, engine_of_form
from tests.helpers.models import tokens
from tests.helpers.rotary_decoder import rotary_decoder
from tests.helpers.sweep import sweep
from tests.passes.test_per_row_deltas import two_deltas
from tests.runtime.generation.test_generate import Spelling

CLOSE = 1e-4
"""Logits that are nearer to each other may change places where other rows run beside."""

NAMES = ["trec", "spam", None]


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(rotary_decoder(), tokens())


@pytest.fixture(scope="module")
def folders(program: Program, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return two_deltas(program, tmp_path_factory.mktemp("deltas"))


ENGINES = [
    "onnx",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx with deltas", "torch with deltas")),
]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, program: Program) -> Iterator[Any]:
    """Appends in place on ONNX Runtime."""
    backend = Torch(generate=True) if "torch" in request.param else Onnx(generate=True, threads=1)
    passes, folders = [], {}
    if "deltas" in request.param:
        passes, folders = [Deltas(("trec", "spam"), capacity=3)], request.getfixturevalue("folders")
    made = bg.compile(program, passes, backend=backend, resources=folders)
    made.batching = Batching(rows=4, prefill=8)
    yield made
    made.stop_batching()


def asked(count: int, longest: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of any lengths with options of their own."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(50) for _ in range(draw.randint(1, longest))],
            "max_new_tokens": draw.randint(1, longest),
            **({"temperature": 1.0, "seed": number} if draw.random() < 0.3 else {}),
        }
        for number in range(count)
    ]


def check_alone(engine: Any, wanted: Sequence[dict[str, Any]], found: Sequence[Sequence[int]]) -> None:
    """Each has the ids that it has alone, up to one where the two best are close."""
    for options, ids in zip(wanted, found):
        expected = engine.generate(
            **{"prompts" if key == "prompt" else key: value for key, value in options.items()}
        )
        if list(ids) == expected:
            continue
        place = next(place for place, (one, other) in enumerate(zip(ids, expected)) if one != other)
        scores = engine.submit(**{**options, "logprobs": 2}).result(60).scores[place].top
        assert scores[0][1] - scores[1][1] < CLOSE, (options, place)


def come_and_go(
    engine: Any, wanted: Sequence[dict[str, Any]], draw: random.Random
) -> list[tuple[dict[str, Any], Request]]:
    """Submit requests between rounds of a scheduler, and cancel some; those that came to their end."""
    engine.stop_batching()
    scheduler = engine._scheduler = Scheduler(engine.decoder(), Batching(rows=7, prefill=11))
    made = []
    for item in wanted:
        for _ in range(draw.choice([0, 0, 0, 1, 1, 4, 20])):
            scheduler.round()
        made.append(engine.submit(**item))
        if draw.random() < 0.1:
            draw.choice(made).cancel()
    while scheduler.round():
        pass
    engine.stop_batching()  # the next request starts a thread again
    return [(item, request) for item, request in zip(wanted, made) if request.finish_reason == "length"]


def test_requests_beside_others_have_the_ids_that_they_have_alone(engine: Any) -> None:
    wanted = asked(12)
    if engine.live is not None:
        wanted = [{**item, "delta": NAMES[number % 3]} for number, item in enumerate(wanted)]
    made = [engine.submit(**item) for item in wanted]
    check_alone(engine, wanted, [item.result(60).ids for item in made])


def test_windows_slide_beside_others(engine: Any) -> None:
    wanted = [
        {**item, "max_new_tokens": 24, "window": 8 + number, "keep": number}
        for number, item in enumerate(asked(4))
    ]
    made = [engine.submit(**item) for item in wanted]
    check_alone(engine, wanted, [item.result(60).ids for item in made])


@pytest.mark.slow
def test_two_hundred_requests_that_come_and_go(engine: Any) -> None:
    """Some wait, some are cancelled, and rows have deltas of their own where there are any."""
    wanted, draw = asked(200, seed=1), random.Random(2)
    if engine.live is not None:
        wanted = [{**item, "delta": draw.choice(NAMES)} for item in wanted]
    whole = come_and_go(engine, wanted, draw)
    assert 150 < len(whole) < 200
    check_alone(engine, [item for item, _ in whole], [request.result(0).ids for _, request in whole])


def test_scores_are_those_of_the_softmax(engine: Any) -> None:
    prompt = [3, 14, 15]
    found = engine.submit(
        prompt, max_new_tokens=3, logprobs=4, temperature=5.0, seed=1, repetition_penalty=1.5
    ).result(60)
    for place, score in enumerate(found.scores):
        ids = torch.tensor([[*prompt, *found.ids[:place]]])
        logits = engine(ids=ids, attention_mask=torch.ones_like(ids))["output"][0, -1]
        expected = logits.double().log_softmax(-1)
        assert abs(score.logprob - float(expected[found.ids[place]])) < 1e-4
        values, places = expected.topk(4)
        assert [item for item, _ in score.top] == places.tolist()
        assert np.allclose([value for _, value in score.top], values, atol=1e-4)
    again = engine.generate(
        [prompt, [5]], max_new_tokens=3, logprobs=4, temperature=5.0, seed=(1, 2), repetition_penalty=1.5
    )[0]
    assert (again.ids, again.finish_reason, again.prompt_tokens) == (found.ids, "length", 3)
    for score, other in zip(again.scores, found.scores):
        assert abs(score.logprob - other.logprob) < 1e-4
    ended = engine.generate(
        prompt, max_new_tokens=3, logprobs=0, eos=engine.generate(prompt, max_new_tokens=3)[1]
    )
    assert (len(ended.ids), ended.finish_reason) == (1, "stop")
    with pytest.raises(
        InputError, match="logprobs with stream, num_beams or speculate: leave one of them out"
    ):
        engine.generate(prompt, logprobs=1, stream=True)
    assert engine.submit(prompt, max_new_tokens=1).result(60).scores is None
    assert engine.submit(prompt, max_new_tokens=1, logprobs=0).result(60).scores[0].top == ()


def test_texts_end_at_stops_and_ids(engine: Any) -> None:
    engine.tokenizer = tokenizer_of(Spelling())
    try:
        whole = engine.generate("dog", max_new_tokens=12)
        made = engine.submit("dog", max_new_tokens=12)
        assert "".join(made) == whole
        found = made.result(0)
        assert (found.text, found.finish_reason, found.prompt_tokens, found.new_tokens) == (
            whole,
            "length",
            3,
            12,
        )
        stopped = engine.submit("dog", max_new_tokens=12, stop=whole[4:6])
        assert stopped.result(60).text == whole[: whole.index(whole[4:6])]
        assert stopped.finish_reason == "stop"
        end = Spelling().encode(whole[3])[0]
        ended = engine.submit("dog", max_new_tokens=12, eos=end).result(60)
        assert (ended.text, ended.finish_reason) == (whole[: whole.index(whole[3])], "stop")
        assert ended.ids == tuple(Spelling().encode(ended.text))
    finally:
        engine.tokenizer = None


@pytest.mark.slow
def test_a_delta_is_held_as_long_as_its_request(engine: Any, folders: dict[str, str]) -> None:
    if engine.live is None:
        pytest.skip("has no deltas")
    prompt = [3, 14, 15]
    expected = engine.submit(prompt, max_new_tokens=16, delta="trec").result(60).ids
    assert engine.submit(prompt, max_new_tokens=16).result(60).ids != expected
    made = engine.submit(prompt, max_new_tokens=16, delta="trec")
    engine.deltas.swap("trec", folders["spam"])
    later = engine.submit(prompt, max_new_tokens=16, delta="trec")
    assert made.result(60).ids == expected
    assert later.result(60).ids == engine.submit(prompt, max_new_tokens=16, delta="spam").result(60).ids
    engine.deltas.swap("trec", folders["trec"])
    assert not any(engine.live._slots._readers)
    with pytest.raises(InputError, match="input 'delta' names 'span'; did you mean 'spam'"):
        engine.submit(prompt, delta="span")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([[3], [4]], {}, "submit takes one prompt: call it once for each"),
        ([], {}, "prompt 0 is empty"),
        ([50], {}, "prompt 0 has id 50"),
        ([3], {"n": 2}, "submit has no option 'n'"),
        ([3], {"temprature": 1.0}, "submit has no option 'temprature'; did you mean 'temperature'"),
        ([3], {"logprobs": -1}, "logprobs=-1: give a whole number from 0 to 64"),
        ([3], {"max_new_tokens": 0}, "max_new_tokens=0: give at least 1"),
        ("dog", {}, "prompt 0 is a text, and this engine has no tokenizer"),
        ([3], {"max_new_tokens": 10**8}, "the request may come to 100000001 positions"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    engine: Any, prompt: Any, options: Any, message: str
) -> None:
    before = engine.batching
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        engine.submit(prompt, **options)
    assert engine.batching is before
    assert engine.live is None or not any(engine.live._slots._readers)


def test_an_engine_that_nobody_has_leaves_no_thread() -> None:
    made = CountingEngine()
    running = made.submit([3], max_new_tokens=39)
    thread = made.scheduler()._thread
    assert thread is not None
    del made
    gc.collect()
    assert list(running.result(60).ids) == alone([3], 39)  # a request keeps its engine
    del running
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    made = CountingEngine()
    made.submit([3], max_new_tokens=3).result(60)
    made.stop_batching()
    assert list(made.submit([3], max_new_tokens=3)) == alone([3], 3)
    made.stop_batching()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_of_decoders(name: str, backend: str) -> None:
    made = engine_of_form(name, backend)
    wanted = asked(40)
    check_alone(made, wanted, [item.result(60).ids for item in [made.submit(**item) for item in wanted]])


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep(("llama", "gpt2", "opt", "gpt_neox", "bloom"), ("llama",)))
def test_architectures(name: str) -> None:
    _, program = captured(name)
    made = bg.compile(program, backend=Onnx(generate=True))
    made.batching = Batching(rows=3, prefill=5)
    vocabulary = made.decoder().cache.vocabulary
    wanted = [{**item, "prompt": [value % vocabulary for value in item["prompt"]]} for item in asked(20, 8)]
    check_alone(made, wanted, [item.result(60).ids for item in [made.submit(**item) for item in wanted]])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantised_requests_are_near_what_they_are_alone(scheme: str) -> None:
    """Kernels for several rows round otherwise: each id chosen is, teacher-forced, near the likeliest."""
    model = rotary_decoder(width=64)
    program = bg.capture(model, tokens())
    passes = (
        [Quantize("int4", method="rtn", group=16)]
        if scheme == "int4"
        else [Quantize("int8", activations="none")]
    )
    made = bg.compile(program, passes, backend=Onnx(generate=True), max_drift=2.0)
    wanted = [item for item in asked(40) if "temperature" not in item]
    for options, request in zip(wanted, [made.submit(**item) for item in wanted]):
        ids = request.result(60).ids
        for place, chosen in enumerate(ids):
            text = [*options["prompt"], *ids[:place]]
            score = (
                made.submit(text, max_new_tokens=1, logprobs=1, logit_bias={chosen: 100.0})
                .result(60)
                .scores[0]
            )
            assert score.top[0][1] - score.logprob < 0.05, (options, place)
