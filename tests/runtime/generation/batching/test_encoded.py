"""Encoder-decoders in one batch: each request has the ids that it has alone, whatever is encoded beside it and however long that is."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.passes import Deltas, LoRA, Quantize
from bmgraph.runtime.generation.batching.joining import joining
from bmgraph.runtime.generation.batching.options import Batching
from bmgraph.runtime.generation.batching.row_memories import RowMemories
from bmgraph.runtime.generation.batching.scheduler import Scheduler
from tests.helpers.sweep import sweep
from tests.helpers.translator import IDS, ROOM, pair, translator
from tests.passes.test_per_row_deltas import two_deltas
from tests.runtime.generation.batching.test_submit import check_alone
from tests.runtime.generation.test_generate import Spelling

START = 3

SPECS = (
    TensorSpec("seen", torch.bool, ("batch", 1, 1, "sequence")),
    TensorSpec("keys", torch.float32, ("batch", 2, "sequence", 3)),
    TensorSpec("pooled", torch.float32, ("batch", 4)),
)


def memories(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Memories of prompts with a position of padding behind."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = [(rows, 1, 1, length), (rows, 2, length, 3), (rows, 4)]
    values = [torch.rand(size, generator=drawn) for size in sizes]
    return {
        spec.name: value > 0.5 if spec.dtype == torch.bool else value for spec, value in zip(SPECS, values)
    }


@settings(max_examples=40)
@given(
    st.lists(st.one_of(st.integers(1, 9), st.lists(st.integers(0, 5), max_size=6, unique=True)), max_size=12)
)
def test_memories_of_rows_keep_their_values_before_padding(events: list[Any]) -> None:
    """A number: a row of so many positions joins; a list: of the rows only those go on."""
    rows: list[dict[str, torch.Tensor]] = [memories(1, 4, 99)]
    joined = RowMemories(SPECS, rows[0])
    for number, event in enumerate(events):
        if isinstance(event, int):
            rows.append(memories(1, event, number))
            joined.reserve(number % 5)
            joined.join(RowMemories(SPECS, rows[-1]))
        else:
            kept = [row for row in event if row < len(rows)] or [0]
            joined.keep_rows(kept)
            rows = [rows[row] for row in kept]
        for place, row in enumerate(rows):
            for spec in SPECS:
                found, own = joined.values[spec.name][place], row[spec.name][0]
                assert joined.values[spec.name].is_contiguous()
                if spec.name == "pooled":
                    assert torch.equal(found, own)
                    continue
                axis, length = (2, own.shape[-1]) if spec.name == "seen" else (1, own.shape[1])
                assert torch.equal(found.narrow(axis, 0, length), own)
                last = own.narrow(axis, length - 1, 1)
                assert bool((found.narrow(axis, length, found.shape[axis] - length) == last).all())
                assert found.shape[axis] < 2 * max(item["keys"].shape[2] for item in rows) + 1


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(translator(), pair())


@pytest.fixture(scope="module", params=["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest, program: Program) -> Iterator[Any]:
    made = bg.compile(
        program, backend=Onnx(generate=True, threads=1) if request.param == "onnx" else Torch(generate=True)
    )
    made.batching = Batching(rows=4, prefill=16)
    yield made
    made.stop_batching()


def asked(count: int, seed: int = 0, longest: int = ROOM, ids: int = IDS) -> list[dict[str, Any]]:
    """Prompts of any lengths, some as long as the encoder takes, with options of their own."""
    draw = random.Random(seed)
    return [
        {
            "prompt": [draw.randrange(ids) for _ in range(draw.choice([longest, draw.randint(1, longest)]))],
            "max_new_tokens": draw.randint(1, longest),
            "start": START,
            **({"temperature": 1.0, "seed": number} if draw.random() < 0.3 else {}),
        }
        for number in range(count)
    ]


def test_requests_beside_others_have_the_ids_that_they_have_alone(engine: Any) -> None:
    wanted = asked(10)
    found = [item.result(60) for item in [engine.submit(**item) for item in wanted]]
    check_alone(engine, wanted, [item.ids for item in found])
    assert len({item.ids[:3] for item in found}) > 5  # they do not all say the same
    assert all(
        item.cached_tokens == 0 and item.prompt_tokens == len(options["prompt"])
        for item, options in zip(found, wanted)
    )


def test_scores_are_those_of_the_model(engine: Any, program: Program) -> None:
    """Beside a longer prompt, which came first, and a shorter one."""
    prompts = [[5] * 30, [7, 8, 9], [4]]
    made = [engine.submit(prompt, max_new_tokens=6, start=START, logprobs=4) for prompt in prompts]
    for prompt, item in zip(prompts, made):
        found = item.result(60)
        ids = torch.tensor([prompt])
        logits = program(
            input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=torch.tensor([[START, *found.ids[:-1]]])
        )["output"]  # fmt: skip
        expected = logits[0].double().log_softmax(-1)
        for place, score in enumerate(found.scores):
            assert abs(score.logprob - float(expected[place, found.ids[place]])) < 1e-4
            assert [item for item, _ in score.top] == expected[place].topk(4).indices.tolist()


COMING = st.lists(
    st.tuples(
        st.integers(1, ROOM),  # tokens of the prompt
        st.integers(1, 12),  # new tokens
        st.integers(0, 4),  # rounds before it comes
        st.one_of(st.none(), st.none(), st.integers(0, 9)),  # which is cancelled then
    ),
    min_size=1,
    max_size=12,
)


def check_coming(engine: Any, coming: Any, rows: int, prefill: int) -> None:
    engine.stop_batching()
    scheduler = engine._scheduler = Scheduler(engine.decoder(), Batching(rows=rows, prefill=prefill))
    draw, wanted, made = random.Random(len(coming)), [], []
    for length, count, wait, cancelled in coming:
        for _ in range(wait):
            scheduler.round()
        prompt = [draw.randrange(IDS) for _ in range(length)]
        wanted.append({"prompt": prompt, "max_new_tokens": count, "start": START})
        made.append(engine.submit(**wanted[-1]))
        if cancelled is not None:
            made[-1 - cancelled % len(made)].cancel()
    while scheduler.round():
        assert scheduler.load.running <= rows
    engine.stop_batching()
    assert {item.finish_reason for item in made} <= {"length", "cancelled"}
    whole = [
        (item, request.so_far.ids) for item, request in zip(wanted, made) if request.finish_reason == "length"
    ]
    check_alone(engine, [item for item, _ in whole], [ids for _, ids in whole])


@settings(max_examples=5)
@given(COMING, st.integers(1, 5), st.integers(1, 64))
def test_requests_that_come_and_go(engine: Any, coming: Any, rows: int, prefill: int) -> None:
    check_coming(engine, coming, rows, prefill)


@pytest.mark.slow
def test_two_hundred_requests_that_come_and_go(engine: Any) -> None:
    draw = random.Random(0)
    choices = [None] * 9 + [0]
    check_coming(
        engine,
        [(draw.randint(1, ROOM), draw.randint(1, ROOM), draw.choice([0, 0, 0, 1, 5, 30]), draw.choice(choices)) for _ in range(200)],
        7, 11,
    )  # fmt: skip


def test_one_request_that_fails_ends_alone(engine: Any) -> None:
    nothing = {item: float("-inf") for item in range(IDS)}
    made = [
        engine.submit([5, 6, 7], max_new_tokens=9, start=START, logit_bias=bias) for bias in (None, nothing)
    ]
    with pytest.raises(InputError, match="no id is left to choose"):
        made[1].result(60)
    assert list(made[0].result(60).ids) == engine.generate([5, 6, 7], max_new_tokens=9, start=START)


def test_what_is_refused(engine: Any, program: Program) -> None:
    for options, message in (
        (
            {"prompt": [1] * (ROOM + 1)},
            f"prompt 0 has 41 tokens, more than the {ROOM} that this model's encoder takes",
        ),
        ({"prompt": [1], "start": None}, "no generation config that says what its decoder starts with"),
        ({"prompt": [1], "max_new_tokens": ROOM + 1}, f"more than the {ROOM} positions of this model"),
        ({"prompt": []}, "prompt 0 is empty"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(**{"start": START, **options})
    engine.stop_batching()
    before, engine.batching = engine.batching, Batching(cache_bytes=20_000)
    with pytest.raises(
        InputError, match=r"may come to 11 positions and 39 of its encoder, which take 0.0 MB of cache"
    ):
        engine.submit([1] * 39, max_new_tokens=10, start=START)
    alone = engine.submit([1], max_new_tokens=10, start=START)  # which takes less
    assert alone.result(60).finish_reason == "length"
    engine.stop_batching()
    engine.batching = before
    decoder = engine.decoder()
    whole, decoder.cache = decoder.cache, replace(decoder.cache, mask=None)  # as made by earlier versions
    with pytest.raises(InputError, match=r"its decoder has no mask .* compile them anew"):
        joining(decoder)
    decoder.cache = whole


def test_a_decoder_that_reads_padding_is_refused() -> None:
    made = bg.compile(translator(blind=True), example=pair(), backend=Torch(generate=True))
    with pytest.raises(
        InputError,
        match="what this model says of a short prompt depends on the padding behind it; use generate",
    ):
        made.submit([3, 4], start=START)


@pytest.mark.slow
def test_a_decoder_whose_positions_cannot_be_shifted_gets_no_mask() -> None:
    """It generates as ever, and is refused here."""
    model = translator(counted=True)
    made = bg.compile(model, example=pair(), backend=Torch(generate=True))
    assert made.decoder().cache.mask is None
    found = made.generate([5, 6, 7], max_new_tokens=6, start=START)
    ids = torch.tensor([[5, 6, 7]])
    for place, chosen in enumerate(found):
        with torch.no_grad():
            begun = torch.tensor([[START, *found[:place]]])
            assert int(model(ids, torch.ones_like(ids), begun)[0, -1].argmax()) == chosen
    with pytest.raises(
        InputError, match="its decoder has no mask that could hide the padding in front of shorter rows"
    ):
        made.submit([3, 4], start=START)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_each_row_has_a_delta_of_its_own(program: Program, tmp_path: Any, backend: str) -> None:
    loras = LoRA(r=3, alpha=5, roles=("linear", "attention.*")), LoRA(r=2, roles=("attention.q",))
    made = bg.compile(
        program, [Deltas(("trec", "spam"))], resources=two_deltas(program, tmp_path, *loras),
        backend=Onnx(generate=True, threads=1) if backend == "onnx" else Torch(generate=True),
    )  # fmt: skip
    made.batching = Batching(rows=4)
    names = ["trec", "spam", None]
    wanted = [{**item, "delta": names[number % 3]} for number, item in enumerate(asked(18))]
    found = [item.result(60).ids for item in [made.submit(**item) for item in wanted]]
    check_alone(made, wanted, found)
    prompt = {"prompt": [5, 6, 7], "max_new_tokens": 9, "start": START}
    assert len({made.submit(**prompt, delta=name).result(60).ids for name in names}) == 3
    made.stop_batching()


@pytest.mark.slow
def test_quantised_requests_are_near_what_they_are_alone(program: Program) -> None:
    made = bg.compile(
        program, [Quantize("int8", activations="none")], backend=Onnx(generate=True), max_drift=2.0
    )
    wanted = [item for item in asked(20) if "temperature" not in item]
    found = [item.result(60).ids for item in [made.submit(**item) for item in wanted]]
    check_alone(made, wanted, found)
    made.stop_batching()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("name", sweep(("t5", "t5_gated", "Bart", "MBart", "Pegasus"), ("t5", "Bart")))
def test_architectures(name: str, backend: str) -> None:
    from tests.runtime.generation.test_zoo_generate import with_head

    _, program = with_head(name)
    made = bg.compile(program, backend=Onnx(generate=True) if backend == "onnx" else Torch(generate=True))
    made.batching = Batching(rows=3)
    wanted = [{**item, "eos": ()} for item in asked(20, longest=20, ids=made.decoder().cache.vocabulary)]
    found = [item.result(60) for item in [made.submit(**item) for item in wanted]]
    check_alone(made, wanted, [item.ids for item in found])
    made.stop_batching()


def test_an_engine_scores_a_plain_batch_without_the_mask_that_its_cache_brought(
    engine: Any, program: Program
) -> None:
    batch = pair(3, 9, 6)
    expected = program(**batch)["output"]
    assert (engine(**batch)["output"] - expected).abs().max() < 1e-4
    hidden = torch.ones(3, 6, dtype=torch.int64)
    hidden[1, :2] = 0
    shorter = {**batch, "decoder_input_ids": batch["decoder_input_ids"][:, 2:]}
    found = engine(**batch, decoder_mask=hidden)["output"]
    assert (found[1, 2:] - program(**shorter)["output"][1]).abs().max() < 1e-4


def test_a_server_answers_and_tells_what_is_too_long(engine: Any) -> None:
    """The prompt is what the encoder reads."""
    pytest.importorskip("starlette")
    from bmgraph.serving.app import Server
    from bmgraph.serving.options import ServeOptions
    from bmgraph.serving.served_models import ServedModels
    from tests.helpers.asgi import call

    tokenizer: Any = Spelling()
    tokenizer.eos_ids, before = (), engine.generation
    engine.tokenizer, engine.generation = tokenizer, GenerationDefaults(start=START)
    try:
        server = Server(ServedModels(engine, "toy"), ServeOptions())
        body = {"model": "toy", "temperature": 0, "max_tokens": 6}
        prompts = ["dog", "alongerprompt"]
        expected = engine.generate(prompts, max_new_tokens=6)
        several = call(server.app, "POST", "/v1/completions", {**body, "prompt": prompts}).json
        assert [choice["text"] for choice in several["choices"]] == expected
        assert several["usage"]["prompt_tokens"] == 3 + 13
        streamed = call(server.app, "POST", "/v1/completions", {**body, "prompt": "dog", "stream": True})
        texts = [
            json.loads(part[6:])["choices"][0]["text"]
            for part in streamed.text.split("\n\n")
            if part[6:7] == "{"
        ]
        assert "".join(texts) == expected[0]
        for wrong, message in (
            (
                {"prompt": "a" * (ROOM + 1)},
                f"more than the {ROOM} that this model's encoder takes: shorten it",
            ),
            (
                {"prompt": "a", "max_tokens": ROOM + 1},
                "41 new tokens are more than the 40 positions of this model: ask for fewer",
            ),
        ):
            found = call(server.app, "POST", "/v1/completions", {**body, **wrong})
            assert (found.status, found.error["code"]) == (400, "context_length_exceeded")
            assert message in found.error["message"]
        server.close()
    finally:
        engine.tokenizer, engine.generation = None, before
