"""Speculative decoding: whatever is guessed, the ids are those of the same engine that guesses nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import BackendError, InputError
from bmgraph.passes import Deltas, Quantize, SoftPrompt
from bmgraph.runtime.generation.draft_length import COSTS, DraftLength
from bmgraph.runtime.generation.prompt_lookup import CERTAINTIES, FURTHEST, LONGEST, Draft, PromptLookup
from bmgraph.runtime.generation.speculated_row import SpeculatedRow
from bmgraph.runtime.generation.speculation import rewinding
from bmgraph.runtime.generation.step_sizes import has_equal_bits
from bmgraph.runtime.generation.tokenizer import tokenizer_of
from tests.helpers.captured import captured
from tests.helpers.deltas import trained
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.rotary_decoder import rotary_decoder
from tests.helpers.zoo import VOCABULARY
from tests.passes.test_per_row_deltas import two_deltas
from tests.runtime.generation.test_generate import Spelling
from tests.runtime.generation.test_zoo_generate import DECODERS

pytest.importorskip("onnxruntime")

PROMPTS = ([3, 14, 15, 9, 26, 5], [35], [8, 9, 7, 8, 9, 7, 8, 9])
NEW = 28

Guess = Callable[[PromptLookup, int], Draft]


@cache
def engine(form: str) -> Any:
    """A toy engine: rotary positions and int4, or learned positions, of which there are 40, in fp32."""
    backend = Onnx(generate=True, threads=1)
    if form == "positions":
        made = bg.compile(tiny_decoder(), example=tokens(), backend=backend, verify="structure")
    else:
        passes = [Quantize("int4", group=32, embeddings=8)]
        made = bg.compile(rotary_decoder(), passes, example=tokens(), backend=backend, verify="structure")
    try:
        made.generate([3], max_new_tokens=4, speculate=True)
    except BackendError as error:
        pytest.skip(f"kernels of this machine: {error}")
    return made


@pytest.fixture(params=["int4", "positions"])
def found(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Each toy engine, with a tokenizer."""
    made = engine(request.param)
    made.tokenizer = tokenizer_of(Spelling())
    yield made
    made.tokenizer = None


def guessing(answers: dict[tuple[int, ...], list[int]], wrong: float) -> Guess:
    """Guesses of texts that are known, each wrong with a probability; a text that is not known is guessed as it stands."""
    chance = random.Random(0)

    def draft(lookup: PromptLookup, count: int) -> Draft:
        ids = lookup._ids
        known = next((text for begin, text in answers.items() if tuple(ids[: len(begin)]) == begin), [])
        begin = next((len(begin) for begin in answers if tuple(ids[: len(begin)]) == begin), 0)
        ahead = known[len(ids) - begin :][:count]
        return Draft(tuple(chance.randrange(50) if chance.random() < wrong else item for item in ahead), 4)

    return draft


@pytest.mark.parametrize("wrong", [0.0, 0.3, 1.0])
def test_ids_are_those_of_the_reference_whatever_is_guessed(
    found: Any, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.tokenizer = None
    expected = found.generate(PROMPTS, max_new_tokens=NEW, speculate=0)
    assert found.speed.per_step == 1
    assert expected == [found.generate(prompt, max_new_tokens=NEW, speculate=0) for prompt in PROMPTS]
    answers = {tuple(prompt): text for prompt, text in zip(PROMPTS, expected)}
    monkeypatch.setattr(PromptLookup, "draft", guessing(answers, wrong))
    assert found.generate(PROMPTS, max_new_tokens=NEW, speculate=True) == expected
    speed = found.speed
    assert speed.new_tokens == (NEW - 1) * len(PROMPTS)
    assert speed.per_step > 1.5 if not wrong else speed.accepted < speed.drafted
    monkeypatch.undo()
    for count in (1, 3, True):
        assert found.generate(PROMPTS, max_new_tokens=NEW, speculate=count) == expected
    assert found.speed.drafted >= found.speed.accepted


def test_draws_and_penalties_are_those_of_the_reference(found: Any) -> None:
    texts = ["dog", "aaaaaa", "abcabcab"]
    for options in (
        {"temperature": 0.7, "seed": 3, "top_p": 0.9, "n": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"temperature": 2.0, "top_k": 3, "seed": [1, 2, 3], "frequency_penalty": 0.2, "min_new_tokens": 4, "eos": (7, 8, 9)},
    ):  # fmt: skip
        given: Any = {"max_new_tokens": 20, **options}
        assert found.generate(texts, speculate=True, **given) == found.generate(texts, speculate=0, **given)


def test_rows_end_where_the_reference_ends_them(found: Any) -> None:
    whole = found.generate(["dog", "abcabc"], max_new_tokens=24, speculate=0)
    for stop in (whole[0][5:7], whole[1][8:9]):
        cut = [text[: text.index(stop)] if stop in text else text for text in whole]
        assert found.generate(["dog", "abcabc"], max_new_tokens=24, stop=stop, speculate=True) == cut
    end = Spelling().encode(whole[1][6])
    cut = [text[: text.index(whole[1][6])] if whole[1][6] in text else text for text in whole]
    assert found.generate(["dog", "abcabc"], max_new_tokens=24, eos=end, speculate=True) == cut
    assert "".join(found.generate("dog", max_new_tokens=24, stream=True, speculate=True)) == whole[0]
    pieces = found.generate(["dog", "abcabc"], max_new_tokens=24, stream=True, speculate=True)
    assert next(pieces)[0] == 0
    assert whole[1].startswith("".join(piece for row, piece in pieces if row == 1)[:4])


def test_the_last_positions_of_a_model_are_taken() -> None:
    made = engine("positions")
    for length in (1, 9, 29, 30, 31, 38, 39):
        prompt = ([5, 6, 7] * 20)[:length]
        expected = made.generate(prompt, max_new_tokens=40 - length, speculate=0)
        assert made.generate(prompt, max_new_tokens=40 - length, speculate=True) == expected


def test_a_step_with_no_room_behind_reads_the_position_before_again() -> None:
    made = engine("positions")
    decoder = made.decoder()
    rows = [SpeculatedRow(decoder.start(1, {}, 40), decoder.cache, [3, 4, 5, 6], {}) for _ in range(2)]
    for row in rows:
        row.choose(7)
    rows[0].step(Draft(), 2)
    rows[1]._cache = replace(decoder.cache, limit=5)
    rows[1].step(Draft(), 2)
    assert rows[0].scores.tobytes() == rows[1].scores.tobytes()
    assert rows[0].choose(8) == rows[1].choose(8)
    assert rows[0]._held == rows[1]._held == 5


def test_an_engine_whose_tokens_move_each_other_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine("positions")
    monkeypatch.setattr(made.decoder(), "equal_sizes", {})
    read = SpeculatedRow.read

    def moved(row: SpeculatedRow, ids: Sequence[int]) -> Any:
        return read(row, ids) * np.float32(1 + 1e-6 * (len(ids) + ids[-1]))

    monkeypatch.setattr(SpeculatedRow, "read", moved)
    assert len(made.generate([3, 4], max_new_tokens=4, speculate=0)) == 4
    with pytest.raises(BackendError, match="speculate: this engine gives a token other bits beside another"):
        made.generate([3, 4], max_new_tokens=4, speculate=True)


def test_sizes_with_other_bits_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made, prompt = engine("positions"), [5, 6, 7, 8] * 4
    expected = made.generate(prompt, max_new_tokens=20, speculate=0)
    monkeypatch.setattr(made.decoder(), "equal_sizes", {})
    monkeypatch.setattr(PromptLookup, "draft", guessing({tuple(prompt): expected}, 0.0))
    read, sizes = SpeculatedRow.read, []

    def moved(row: SpeculatedRow, ids: Sequence[int]) -> Any:
        sizes.append(len(ids))
        return read(row, ids) * np.float32(1 + 1e-6 * (len(ids) == 8))

    monkeypatch.setattr(SpeculatedRow, "read", moved)
    assert made.generate(prompt, max_new_tokens=20, speculate=True) == expected
    assert made.decoder().equal_sizes[b""].get(8, False) is False
    del sizes[:]
    assert made.generate(prompt, max_new_tokens=20, speculate=True) == expected
    assert 8 not in sizes
    assert max(sizes) >= 2


def test_a_row_is_as_before_when_sizes_were_compared() -> None:
    decoder = engine("positions").decoder()
    rows = [SpeculatedRow(decoder.start(1, {}, 40), decoder.cache, [3, 4, 5], {}) for _ in range(2)]
    for size in COSTS:
        has_equal_bits(rows[1], size, 50)
        assert rows[1].scores.tobytes() == rows[0].scores.tobytes()
    found = [row.read([6, 7]) for row in rows]
    assert found[0].tobytes() == found[1].tobytes()


@pytest.mark.slow
def test_one_scale_for_all_tokens_of_a_call_is_refused() -> None:
    passes = [Quantize("int8", activations="dynamic", site_drift=1.0)]
    backend = Onnx(generate=True, threads=1)
    made = bg.compile(tiny_decoder(), passes, example=tokens(), backend=backend, max_drift=3.0)
    with pytest.raises(BackendError, match="speculate: this engine gives a token other bits beside another"):
        made.generate([3, 4], max_new_tokens=4, speculate=True)


@pytest.mark.parametrize("given", [-1, 16, 2.5, "3"])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(InputError, match="speculate="):
        engine("positions").generate([3], speculate=given)


class Growing:
    """A decoder that takes nothing back."""

    cache, encoder_inputs = None, ()

    def start(self, *given: object) -> None:
        """Nothing."""


def test_a_decoder_that_takes_nothing_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    growing: Any = Growing()
    with pytest.raises(InputError, match="cannot take back what was guessed wrong: compile for ONNX Runtime"):
        rewinding(growing)
    decoder = engine("positions").decoder()
    monkeypatch.setattr(decoder, "cache", replace(decoder.cache, scored=None))
    with pytest.raises(InputError, match="its model scores the last position alone: compile it anew"):
        rewinding(decoder)


def test_what_followed_the_longest_run_the_last_time_is_guessed() -> None:
    generator = random.Random(0)
    for _ in range(200):
        text = [generator.randrange(4) for _ in range(generator.randrange(1, 40))]
        lookup = PromptLookup(text, 10)
        expected = None
        for length in range(LONGEST, 0, -1):
            ends = [end for end in range(length, len(text)) if text[end - length : end] == text[-length:]]
            if ends:
                expected = ends[-1]
                break
        found = lookup.found()
        assert (found[0] if found else None) == expected
        if found:
            place, length = found
            assert text[place - length : place] == text[-length:]
            assert length in (FURTHEST, place) or text[place - length - 1] != text[-length - 1]
            repeated = (text[place:] * 9)[:7]
            assert list(lookup.draft(7).ids) == repeated
    assert PromptLookup([1, -2, 3, 1], 10).draft(3) == Draft((), 1)
    assert PromptLookup([1, 12, 3, 1], 10).draft(3).ids == ()
    assert PromptLookup([1, 2], 10).draft(3) == Draft()


def test_steps_grow_with_the_share_of_right_guesses() -> None:
    length = DraftLength()
    assert length.choose(0, list(COSTS), 0) == 2
    for _ in range(40):
        length.note(3, 7, 0)
        length.note(2, 0, 1)
    assert length.choose(3, [2, 4, 8, 16], 15) == 16
    assert length.choose(3, [2, 4, 8, 16], 7) == 8
    assert length.choose(2, [2, 4, 8, 16], 15) == 2
    assert length.choose(3, [2, 4, 8, 16], 1) == 2
    assert all(0 <= length.share(item) <= 1 for item in range(CERTAINTIES))


SCHEMES: dict[str, list[Any]] = {
    "fp32": [],
    "int8": [Quantize("int8", activations="none")],
    "int4": [Quantize("int4", group=16)],
}


CASES = [
    *((name, "fp32") for name in (*DECODERS, "t5", "t5_gated")),
    *((name, scheme) for name in ("llama", "gptj", "bloom", "t5") for scheme in ("int8", "int4")),
    ("mixtral", "int4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_architectures(name: str, scheme: str) -> None:
    made = bg.compile(captured(name)[1], SCHEMES[scheme], backend=Onnx(generate=True), max_drift=9.0)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, VOCABULARY, size).tolist() for size in (5, 9, 2)]
    expected = made.generate(prompts, max_new_tokens=32, eos=(), speculate=0)
    assert made.generate(prompts, max_new_tokens=32, eos=(), speculate=True) == expected
    assert made.speed.per_step > 1


@pytest.mark.slow
def test_int8_experts_whose_rows_share_a_call_are_refused() -> None:
    made = bg.compile(captured("mixtral")[1], SCHEMES["int8"], backend=Onnx(generate=True), max_drift=9.0)
    with pytest.raises(BackendError, match="or a choice of experts over all tokens of a step"):
        made.generate([3, 4], max_new_tokens=4, speculate=True)


@pytest.mark.slow
def test_rows_keep_the_deltas_that_they_choose(tmp_path: Path) -> None:
    program = bg.capture(tiny_decoder(), tokens())
    both = bg.Pipeline([Deltas(("trec", "spam"))]).run(program, resources=two_deltas(program, tmp_path))
    made = bg.compile(both, backend=Onnx(generate=True))
    options: dict[str, Any] = {"max_new_tokens": 16, "delta": ["trec", "spam", None]}
    expected = made.generate(PROMPTS, speculate=0, **options)
    assert made.generate(PROMPTS, speculate=True, **options) == expected == made.generate(PROMPTS, **options)
    assert len(made.decoder().equal_sizes) == 3  # the numbers of two deltas and of none


@pytest.mark.slow
def test_a_soft_prompt_stands_in_front() -> None:
    prompted = trained(bg.Pipeline([SoftPrompt(3)]).run(bg.capture(tiny_decoder(), tokens())), size=1.0)
    made = bg.compile(prompted, backend=Onnx(generate=True))
    expected = made.generate(PROMPTS, max_new_tokens=16, speculate=0)
    assert made.generate(PROMPTS, max_new_tokens=16, speculate=True) == expected
    assert expected == made.generate(PROMPTS, max_new_tokens=16)
