"""Steps of one token on torch: in place, and over caches of a fixed size, which a GPU records.

Without a GPU a recorder stands in that runs the step anew into the same tensors, as a CUDA graph does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.runtime.torch import fixed_steps
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.runtime.torch.held_cache import HeldCache
from bmgraph.runtime.torch.one_token_steps import OneTokenSteps
from tests.helpers.captured import captured
from tests.runtime.generation.test_zoo_generate import DECODERS, prompts, with_head

QUICK = ("llama", "opt", "t5")
NOT_RECORDED = ("bloom", "gemma2", "t5", "t5_gated")
"""Architectures to whose attention the order of what is cached means something, or whose scores are capped: it is no call of torch's attention."""

NEW = 14


class Again:
    """Records by running anew; `runs` counts the runs of what was recorded, `made` the records."""

    def __init__(self) -> None:
        self.runs = self.made = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.made += 1
        found = run()

        def again() -> None:
            self.runs += 1
            for into, value in zip(found, run()):
                into.copy_(value)

        return again, found


def engine_of(name: str) -> TorchEngine:
    return bg.compile(captured(name)[1], backend=Torch(generate=True), verify="off")


def steps_of(engine: TorchEngine) -> OneTokenSteps | None:
    decoder = engine.decoder()
    assert decoder is not None
    return decoder.steps


def let_run(engine: TorchEngine, steps: OneTokenSteps | None) -> None:
    decoder = engine.decoder()
    assert decoder is not None
    decoder.steps = steps


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_steps, "LEAST_POSITIONS", 8)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS]
)
def test_all_forms_of_a_step_give_the_same_tokens(name: str) -> None:
    engine, again = engine_of(name), Again()
    in_place = steps_of(engine)
    assert in_place is not None, "appended to in place"
    recorded = OneTokenSteps.of(engine.program, torch.device("cpu"), again)
    assert recorded is not None

    def found() -> list[Any]:
        texts = prompts()
        return [
            engine.generate(texts, max_new_tokens=NEW),
            engine.generate(texts[:1], max_new_tokens=NEW, n=2, temperature=1.0, seed=3),
            engine.generate(texts, max_new_tokens=NEW, num_beams=2),
            engine.generate(texts[2:], max_new_tokens=NEW),
        ]

    let_run(engine, None)
    expected = found()
    let_run(engine, in_place)
    assert found() == expected
    let_run(engine, recorded)
    assert found() == expected
    made = again.made
    assert found() == expected
    assert again.made == made, "what was recorded is used again"
    assert (again.runs == 0) == (name in NOT_RECORDED)


def test_what_an_encoder_gave_is_read_by_recorded_steps() -> None:
    model, program = with_head("Bart")
    engine, again = bg.compile(program, backend=Torch(generate=True), verify="off"), Again()
    options: dict[str, Any] = {"max_new_tokens": NEW, "start": model.config.decoder_start_token_id, "eos": ()}
    expected = [engine.generate(texts, **options) for texts in (prompts(), prompts()[::-1])]
    let_run(engine, OneTokenSteps.of(engine.program, torch.device("cpu"), again))
    assert [engine.generate(texts, **options) for texts in (prompts(), prompts()[::-1])] == expected
    made = [engine.submit(prompt, **options) for prompt in prompts()]
    assert [list(item.result(60).ids) for item in made] == expected[0]
    assert again.runs


def test_batches_that_decode_at_the_same_time_have_steps_of_their_own() -> None:
    engine, again = engine_of("llama"), Again()
    expected = [engine.generate([prompt], max_new_tokens=NEW, eos=())[0] for prompt in prompts()]
    let_run(engine, OneTokenSteps.of(engine.program, torch.device("cpu"), again))
    streams = [engine.generate(prompt, max_new_tokens=NEW, eos=(), stream=True) for prompt in prompts()]
    assert [list(ids) for ids in zip(*zip(*streams))] == expected
    assert again.runs


def test_rows_join_and_leave_between_recorded_steps() -> None:
    engine, again = engine_of("llama"), Again()
    texts = [*prompts(), [4, 5], [7] * 11]
    expected = [engine.generate([prompt], max_new_tokens=count)[0] for count, prompt in enumerate(texts, 3)]
    let_run(engine, OneTokenSteps.of(engine.program, torch.device("cpu"), again))
    made = [engine.submit(prompt, max_new_tokens=count) for count, prompt in enumerate(texts, 3)]
    assert [list(item.result(60).ids) for item in made] == expected
    assert again.runs


def test_a_window_slides_between_recorded_steps() -> None:
    engine, again = engine_of("llama"), Again()
    options: dict[str, Any] = {"max_new_tokens": 2 * NEW, "window": 12, "keep": 2, "eos": ()}
    expected = engine.generate(prompts(), **options)
    let_run(engine, OneTokenSteps.of(engine.program, torch.device("cpu"), again))
    assert engine.generate(prompts(), **options) == expected
    assert again.runs


def test_batches_of_nearly_as_many_rows_share_what_is_recorded() -> None:
    engine, again = engine_of("llama"), Again()
    texts = [[5 + number, 9, 4, 7, 3] for number in range(8)]
    expected = [engine.generate(texts[:rows], max_new_tokens=3, eos=()) for rows in (8, 7, 6, 5)]
    let_run(engine, OneTokenSteps.of(engine.program, torch.device("cpu"), again))
    assert [engine.generate(texts[:rows], max_new_tokens=3, eos=()) for rows in (8, 7, 6, 5)] == expected
    assert (again.made, again.runs) == (1, 7)


def test_a_step_that_cannot_be_recorded_runs_as_it_is() -> None:
    engine = engine_of("llama")
    expected = engine.generate(prompts(), max_new_tokens=NEW)

    def refuses(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    steps = OneTokenSteps.of(engine.program, torch.device("cpu"), refuses)
    let_run(engine, steps)
    with pytest.warns(UserWarning, match="cannot be recorded: operation not permitted"):
        assert engine.generate(prompts(), max_new_tokens=NEW) == expected
    assert engine.generate(prompts(), max_new_tokens=NEW) == expected


def test_a_step_that_gives_other_logits_is_not_used() -> None:
    engine = engine_of("llama")
    expected = engine.generate(prompts(), max_new_tokens=NEW)
    steps = OneTokenSteps.of(engine.program, torch.device("cpu"), Again())
    assert steps is not None
    assert steps.fixed is not None
    module = steps.fixed._module
    steps.fixed._module = lambda *values: (module(*values)[0] * 1.01, *module(*values)[1:])
    let_run(engine, steps)
    with pytest.warns(UserWarning, match="logits are .* from those of the step as it is"):
        assert engine.generate(prompts(), max_new_tokens=NEW) == expected


def test_room_is_taken_once_for_many_positions() -> None:
    slots = list(_slots())
    cache = HeldCache(slots, {slot.past.name: torch.randn(2, 3, 5, 4) for slot in slots})
    first = {name: part.clone() for name, part in cache.items()}
    addresses = set()
    for number in range(40):
        for part in cache.with_room(1).values():
            part[:, :, -1] = number
            addresses.add(part.data_ptr())
        cache.hold(1)
    assert cache.count == 45
    assert len(addresses) == len(slots)
    for name, part in cache.items():
        assert torch.equal(part[:, :, :5], first[name])
        assert torch.equal(part[0, 0, 5:, 0], torch.arange(40.0))


def _slots() -> Any:
    decoder = engine_of("llama").decoder()
    assert decoder is not None
    return decoder.cache.slots
