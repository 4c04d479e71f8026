"""Several answers, or beams, of a prompt read it once; and what a model without a bound on positions may be asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import bmgraph as bg
from bmgraph.backends import Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.runtime.generation import decode_loop
from bmgraph.runtime.ort.decoder import OrtDecodeState
from tests.helpers.models import tokens
from tests.helpers.rotary_decoder import rotary_decoder

PROMPTS = ([3, 14, 15, 9, 26, 5], [35], [8, 9, 7])

CALLS: dict[str, dict[str, Any]] = {
    "answers": {"n": 3, "temperature": 1.0, "seed": 5},
    "scores": {"n": 2, "temperature": 1.0, "seed": 5, "logprobs": 2},
    "beams": {"num_beams": 3, "n": 2},
}


class Never:
    """No state is one."""


@cache
def engine(backend: str) -> Any:
    chosen = {"onnx": Onnx(generate=True, threads=1), "torch": Torch(generate=True)}[backend]
    return bg.compile(rotary_decoder(), example=tokens(), backend=chosen)


@pytest.mark.parametrize("backend", ["onnx", "torch"])
@pytest.mark.parametrize("kind", CALLS)
def test_the_results_are_those_of_rows_that_read_each(
    backend: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": 9, "eos": (), **CALLS[kind]}
    found = engine(backend).generate(list(PROMPTS), **options)
    alone = engine(backend).generate(PROMPTS[0], **options)
    monkeypatch.setattr(decode_loop, "RepeatingState", Never)
    expected = engine(backend).generate(list(PROMPTS), **options)
    if kind == "scores":
        found, expected = ([[item.ids for item in row] for row in rows] for rows in (found, expected))
    assert found == expected
    assert len(alone) == options["n"]


def test_a_prompt_is_read_by_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    step = OrtDecodeState.step

    def watched(self: OrtDecodeState, feeds: Any) -> Any:
        shapes.append(feeds["ids"].shape)
        return step(self, feeds)

    monkeypatch.setattr(OrtDecodeState, "step", watched)
    engine("onnx").generate(PROMPTS[0], n=4, max_new_tokens=3, eos=(), temperature=1.0, seed=1)
    assert shapes == [(1, 6), (4, 1), (4, 1)]


def test_new_tokens_that_memory_has_no_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("onnx")
    assert made.decoder().cache.limit is None
    position = made.decoder().cache.bytes_of_position
    monkeypatch.setattr(decode_loop, "free_memory", lambda: 20 * position)
    with pytest.raises(
        InputError, match=r"may take .* GB .*: give at most 14, or let the oldest tokens go \(window=\)$"
    ):
        made.generate(PROMPTS[0], max_new_tokens=15, eos=())
    assert len(made.generate(PROMPTS[0], max_new_tokens=14, eos=())) == 14
    with pytest.raises(InputError, match=r"in 2 rows .* give at most 4, or let"):
        made.generate(PROMPTS[0], max_new_tokens=5, n=2, temperature=1.0)
