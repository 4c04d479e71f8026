"""`engine.submit` on OpenVINO: rows are chosen by an input of a step, and join through the state of requests; ids are those alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import bmgraph as bg
from bmgraph.backends import OpenVINO
from bmgraph.passes import Deltas, Quantize, SoftPrompt
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from bmgraph.runtime.generation.decode_loop import step_feeds
from tests.helpers.deltas import trained
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.openvino import needs_openvino
from tests.helpers.rotary_decoder import rotary_decoder
from tests.helpers.translator import ROOM, pair, translator
from tests.passes.test_per_row_deltas import two_deltas
from tests.runtime.generation.batching.test_encoded import asked as asked_of_encoder
from tests.runtime.generation.batching.test_prefixes import shared
from tests.runtime.generation.batching.test_submit import asked, check_alone, come_and_go

needs_openvino()


def served(backend: OpenVINO, model: Any = None, passes: Any = (), **options: Any) -> Any:
    """An engine with small batches."""
    given = model if model is not None else rotary_decoder()
    made = bg.compile(given, passes, example=options.pop("example", tokens()), backend=backend, **options)
    made.batching = Batching(rows=4, prefill=8)
    return made


def check(made: Any, wanted: list[dict[str, Any]]) -> list[Any]:
    """All at once have what each has alone; returns the answers."""
    found = [item.result(120) for item in [made.submit(**item) for item in wanted]]
    check_alone(made, wanted, [item.ids for item in found])
    return found


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    made = served(OpenVINO(generate=True, threads=1))
    yield made
    made.stop_batching()


def test_requests_beside_others_have_the_ids_that_they_have_alone(engine: Any) -> None:
    found = check(engine, asked(10))
    assert len({item.ids[:2] for item in found}) > 4
    again = engine.submit(asked(10)[0]["prompt"], max_new_tokens=2).result(60)
    assert again.cached_tokens > 0 or len(asked(10)[0]["prompt"]) == 1  # prompts are kept


def test_rows_of_a_state_join_leave_and_forget(engine: Any) -> None:
    """In any order between two steps, as a state of all rows that was read at once."""
    decoder, drawn = engine.decoder(), np.random.default_rng(0)

    def read(state: Any, ids: Any, held: int) -> Any:
        mask = np.ones((len(ids), held + ids.shape[1]), np.int64)
        return state.step(step_feeds(decoder.cache, ids, mask, {}, [ids.shape[1] - 1]))

    texts = drawn.integers(0, 50, (4, 9))
    states = [decoder.start(1, {}, 20) for _ in range(4)]
    for state, text in zip(states, texts):
        read(state, text[None], 0)
    states[0].join(states[1])
    states[0].keep_rows([1, 0])
    states[0].join(states[2])
    states[0].join(states[3])
    states[0].keep_rows([3, 1, 0])
    kept = states[0].positions(1, 2, 7)
    order = texts[[3, 0, 1]]
    whole = decoder.start(3, {}, 20)
    read(whole, order, 0)
    for one, other in zip(kept.values, whole.positions(1, 2, 7).values):
        assert torch.allclose(one, other, atol=1e-5)
    last = drawn.integers(0, 50, (3, 1))
    assert np.allclose(read(states[0], last, 9), read(whole, last, 9), atol=1e-4)
    states[0].repeat_rows(2)
    whole.reorder(np.array([0, 0, 1, 1, 2, 2]))
    last = drawn.integers(0, 50, (6, 1))
    assert np.allclose(read(states[0], last, 10), read(whole, last, 10), atol=1e-4)
    begun = decoder.start(1, {}, 20)
    begun.begin_with([kept])
    assert np.array_equal(begun.positions(0, 0, 5).values[0], kept.values[0])


@pytest.mark.slow
def test_two_hundred_requests_that_come_and_go(engine: Any) -> None:
    wanted, draw = asked(200, seed=1), random.Random(2)
    whole = come_and_go(engine, wanted, draw)
    assert 150 < len(whole) < 200
    check_alone(engine, [item for item, _ in whole], [request.so_far.ids for _, request in whole])


@pytest.mark.slow
def test_padding_in_front_is_dropped(engine: Any) -> None:
    """One row is long, and others come and go beside it until it ends: the cache grows with the longest alone."""
    engine.stop_batching()
    scheduler = engine._scheduler = Scheduler(engine.decoder(), Batching(rows=3))
    wanted = [{"prompt": [1 + number % 40] * 3, "max_new_tokens": 20} for number in range(30)]
    made = [engine.submit(**item) for item in wanted]
    longest = 0
    while scheduler.round():
        longest = max(longest, scheduler._batch._held)
    engine.stop_batching()
    assert longest < 3 * 64
    check_alone(engine, wanted, [request.so_far.ids for request in made])


@pytest.mark.slow
def test_prompts_that_begin_alike_are_read_once(engine: Any) -> None:
    wanted = shared(30)
    for _ in range(2):
        found = check(engine, wanted)
    assert sum(item.cached_tokens for item in found) > sum(item.prompt_tokens for item in found) // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learned positions", "window", "bias", "soft prompt"])
def test_forms_of_decoders(name: str) -> None:
    model = {"window": lambda: rotary_decoder(window=3), "bias": lambda: rotary_decoder(bias=True)}.get(
        name, tiny_decoder
    )
    program = bg.capture(model(), tokens())
    if name == "soft prompt":
        program = trained(bg.Pipeline([SoftPrompt(3)]).run(program), size=1.0)
    made = bg.compile(program, backend=OpenVINO(generate=True, threads=1))
    made.batching = Batching(rows=5, prefill=7)
    check(made, asked(40))
    made.stop_batching()


@pytest.mark.slow
def test_each_row_has_a_delta_of_its_own(tmp_path: Any) -> None:
    program = bg.capture(rotary_decoder(), tokens())
    made = served(
        OpenVINO(generate=True, threads=1), program, [Deltas(("trec", "spam"))], resources=two_deltas(program, tmp_path)
    )  # fmt: skip
    check(
        made, [{**item, "delta": ["trec", "spam", None][number % 3]} for number, item in enumerate(asked(20))]
    )
    made.stop_batching()


@pytest.mark.slow
def test_encoder_decoders() -> None:
    made = served(OpenVINO(generate=True, threads=1), translator(), example=pair())
    wanted = asked_of_encoder(20)
    found = [item.result(120) for item in [made.submit(**item) for item in wanted]]
    lengths = {shapes[0][1] for shapes in made.graphs["encoder"].models.shapes}
    assert {32, ROOM} <= lengths
    assert len(lengths) < 8  # not a model for each length
    check_alone(made, wanted, [item.ids for item in found])
    made.stop_batching()


@pytest.mark.slow
def test_rows_that_join_keep_their_codes_of_8_bits() -> None:
    """What is read of a cache in codes and written again has the same codes."""
    made = served(
        OpenVINO(generate=True, threads=1, kv_cache="int8"), rotary_decoder(width=64), max_drift=2.0
    )
    made.batching = Batching(rows=4, prefix_bytes=0)  # prompts are read whole, as `generate` does
    check(made, asked(40))
    made.stop_batching()


@pytest.mark.slow
def test_quantised_requests_are_near_what_they_are_alone() -> None:
    """Kernels for several rows round otherwise: each id chosen is, teacher-forced, near the likeliest."""
    made = served(
        OpenVINO(generate=True, threads=1),
        rotary_decoder(width=64),
        [Quantize("int8", activations="none")],
        max_drift=2.0,
    )
    wanted = [item for item in asked(30) if "temperature" not in item]
    for options, request in zip(wanted, [made.submit(**item) for item in wanted]):
        ids = request.result(60).ids
        for place, chosen in enumerate(ids):
            text = [*options["prompt"], *ids[:place]]
            asked_again = made.submit(text, max_new_tokens=1, logprobs=1, logit_bias={chosen: 100.0})
            score = asked_again.result(60).scores[0]
            assert score.top[0][1] - score.logprob < 0.05, (options, place)
    made.stop_batching()
