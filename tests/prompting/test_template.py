"""Templates to ids, compared with a naive renderer that cuts token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmgraph.errors import InputError
from bmgraph.prompting.prompts import PromptMaker
from bmgraph.prompting.template import Template
from bmgraph.prompting.truncation import kept_tokens
from tests.helpers.prompting import SPECIAL, WORDS, byte_tokenizer, numbered_tokenizer, word_tokenizer

QUIET: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}
"""A busy machine fails no test."""

texts = st.lists(st.sampled_from(WORDS[5:]), max_size=6).map(" ".join)


@st.composite
def templates(draw: st.DrawFn) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Nodes as dicts, of every kind, with at least one mask; and a row."""
    node = st.one_of(
        st.just({"mask": None}),
        st.builds(
            lambda name, cut: {"placeholder": name, "shortenable": cut}, st.sampled_from("ab"), st.booleans()
        ),
        st.builds(lambda cut: {"meta": "c", "shortenable": cut, "post_processing": "lower"}, st.booleans()),
        st.builds(lambda text, cut: {"text": text or "w0", "shortenable": cut}, texts, st.booleans()),
        st.builds(
            lambda count, same: {"soft": None, "duplicate": count, "same": same},
            st.integers(1, 3),
            st.booleans(),
        ),
        st.builds(lambda text: {"soft": text or "w1"}, texts),
        st.builds(lambda index: {"soft_id": index}, st.integers(1, 2)),
        st.just({"special": "<sep>"}),
    )
    nodes = draw(st.lists(node, max_size=4))
    for sure in (
        {"mask": None},
        {"placeholder": "a", "shortenable": True},
        {"placeholder": "b", "shortenable": True},
    ):
        nodes.insert(draw(st.integers(0, len(nodes))), sure)
    return nodes, {"a": draw(texts), "b": draw(texts), "c": draw(texts)}


def naive(
    nodes: list[dict[str, Any]], row: dict[str, str], limit: int, method: str
) -> list[tuple[int, str]] | None:
    """(id, kind) of every token, cut one by one; None where too little may be cut."""
    word_ids = {word: index for index, word in enumerate(WORDS)}
    pieces: list[list[tuple[int, str]]] = []
    soft, named = 0, {}
    for node in nodes:
        kind = "cut" if node.get("shortenable") else "fixed"
        if "mask" in node:
            piece = [(4, "mask")]
        elif "special" in node:
            piece = [(3, "fixed")]
        elif "soft" in node or "soft_id" in node:
            if node.get("soft_id") in named:
                tokens = named[node["soft_id"]]
            else:
                count = len(node["soft"].split()) if node.get("soft") else node.get("duplicate", 1)
                tokens = [soft] * count if node.get("same") else [soft + offset for offset in range(count)]
                soft += 1 if node.get("same") else count
                if "soft_id" in node:
                    named[node["soft_id"]] = tokens
            piece = [(-1 - token, "fixed") for token in tokens]
        else:
            words = node["text"] if "text" in node else row[node.get("placeholder", node.get("meta"))]
            piece = [(word_ids[word], kind) for word in words.split()]
        pieces.append(piece)
    while sum(map(len, pieces)) + 2 > limit:
        order = pieces if method == "head" else pieces[::-1]
        found = next((piece for piece in order if any(kind == "cut" for _, kind in piece)), None)
        if found is None:
            return None
        del found[0 if method == "head" else -1]
    return [(2, "fixed"), *(token for piece in pieces for token in piece), (3, "fixed")]


def written(nodes: list[dict[str, Any]]) -> str:
    return " ".join(repr(node) for node in nodes)


@settings(max_examples=60, **QUIET)
@given(templates(), st.integers(-1, 9), st.sampled_from(["head", "tail"]))
def test_prompts_are_those_of_a_naive_renderer(given: Any, excess: int, method: str) -> None:
    nodes, row = given
    limit = len(naive(nodes, row, 1000, method) or ()) - excess
    maker = PromptMaker(Template(written(nodes), word_tokenizer(), special=SPECIAL), "encoder", method, limit)
    expected = naive(nodes, row, limit, method)
    if expected is None:
        with pytest.raises(InputError, match="may not be cut"):
            maker.prompt(row)
        return
    found = maker.prompt(row)
    assert list(found.ids) == [index for index, _ in expected]
    assert list(found.masks) == [place for place, (_, kind) in enumerate(expected) if kind == "mask"]
    assert len(found.ids) <= limit


@settings(max_examples=20, **QUIET)
@given(templates(), st.integers(-1, 9))
def test_balanced_cuts_pieces_in_proportion_and_masks_never(given: Any, excess: int) -> None:
    nodes, row = given
    template = Template(written(nodes), word_tokenizer(), special=SPECIAL)
    whole = PromptMaker(template, "encoder").prompt(row)
    pieces = [piece for piece in template.pieces(row) if piece.shortenable]
    room, limit = sum(len(piece.ids) for piece in pieces), len(whole.ids) - excess
    maker = PromptMaker(template, "encoder", "balanced", limit)
    if excess > room:
        with pytest.raises(InputError, match="may not be cut"):
            maker.prompt(row)
        return
    found = maker.prompt(row)
    assert len(found.ids) == min(limit, len(whole.ids))
    assert len(found.masks) == template.masks
    assert all(found.ids[place] == 4 for place in found.masks)
    lengths = [len(piece.ids) for piece in pieces]
    if excess > 0:
        cuts = [
            length - (end - begin)
            for length, (begin, end) in zip(
                lengths, kept_tokens(lengths, [True] * len(lengths), excess, "balanced")
            )
        ]
        assert sum(cuts) == excess
        assert all(abs(cut - excess * length / room) < 1 for cut, length in zip(cuts, lengths))


@settings(max_examples=12, **QUIET)
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from(["left", "right"]), st.integers(1, 3))
def test_padding_keeps_ids_and_finds_the_masks(rows: list[str], side: str, masks: int) -> None:
    template = Template(
        '{"placeholder": "text_a"}' + ' {"mask"} w3' * masks, word_tokenizer(), special=SPECIAL
    )
    maker = PromptMaker(template, "encoder")
    prompts = [maker.prompt(row) for row in rows]
    batch = maker.batch(prompts, side, segments=True)
    positions = maker.positions(prompts, side)
    for index, prompt in enumerate(prompts):
        kept = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][kept].tolist() == list(prompt.ids)
        assert batch["input_ids"][index][~kept].eq(0).all()
        assert bool(kept[-1 if side == "left" else 0])
        assert batch["input_ids"][index][positions[index]].tolist() == [4] * masks
    assert batch["token_type_ids"].eq(0).all()


@settings(max_examples=12, **QUIET)
@given(st.text(max_size=20), st.text(max_size=20), st.integers(12, 30), st.sampled_from(["left", "right"]))
def test_a_decoder_sees_what_stands_in_front_of_the_mask(
    first: str, second: str, limit: int, side: str
) -> None:
    tokenizer = byte_tokenizer()
    template = Template('{"placeholder": "text_a"} is {"mask"}.', tokenizer)
    maker = PromptMaker(template, "decoder", "head", limit)
    prompts = [maker.prompt(first), maker.prompt(second)]
    batch, positions = maker.batch(prompts, side), maker.positions(prompts, side)
    for index, text in enumerate((first, second)):
        ids = [*tokenizer.encode(text).ids, *tokenizer.encode(" is").ids][-limit:]
        kept = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][kept].tolist() == ids
        assert int(batch["input_ids"][index][positions[index][0]]) == ids[-1]


def test_an_encoder_decoder_has_numbered_tokens_at_its_masks() -> None:
    tokenizer = numbered_tokenizer()
    template = Template('{"placeholder": "text_a"} {"mask"} w2 {"mask"}', tokenizer, {"pad": "<pad>"})
    prompt = PromptMaker(template, "encoder-decoder", start=0).prompt("w0 w1")
    first, second = tokenizer.token_to_id("<x_0>"), tokenizer.token_to_id("<x_1>")
    assert prompt.ids == (3, 4, first, 5, second, 1)
    assert prompt.decoder == (0, first, second)
    assert prompt.masks == (1, 2)


def test_special_tokens_in_a_row_are_words() -> None:
    maker = PromptMaker(
        Template('{"placeholder": "text_a"} {"mask"}', word_tokenizer(), special=SPECIAL), "encoder"
    )
    prompt = maker.prompt("w0 [MASK] w1")
    assert prompt.ids.count(4) == 1
    assert prompt.masks == (len(prompt.ids) - 2,)


def test_soft_tokens_start_as_their_words_and_share_by_id() -> None:
    text = '{"soft": None} {"soft": "w5", "soft_id": 1} {"soft"} {"soft": "w6 w7", "soft_id": 3} {"soft_id": 1} {"soft": "w8"} {"mask"}'
    template = Template(text, word_tokenizer(), special=SPECIAL)
    ids = [[-1 - index for index in piece.ids] for piece in template.pieces({}) if piece.kind == "soft"]
    assert ids == [[0], [1], [2], [3, 4], [1], [5]]
    assert template.soft_words == (None, 10, None, 11, 12, 13)


def test_files_hold_a_template_a_line(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text(
        '{"placeholder": "text_a"} is {"mask"}\n\nA {"mask"} news: {"meta": "title", "post_processing": "end_sentence"}\n'
    )
    template = Template.from_file(path, word_tokenizer(), choice=1, special=SPECIAL)
    assert template.wrap({"meta": {"title": "w1"}}) == "A <mask> news: w1."
    with pytest.raises(InputError, match="has 2 templates: choice=2"):
        Template.from_file(path, word_tokenizer(), choice=2, special=SPECIAL)
    with pytest.raises(InputError, match="cannot read templates"):
        Template.from_file(tmp_path / "none.txt", word_tokenizer(), special=SPECIAL)


def made(
    text: str, model: str = "encoder", limit: int | None = None, how: str = "tail", row: Any = "w1 w2 w3"
) -> object:
    tokenizer, special = (byte_tokenizer(), {}) if model == "decoder" else (word_tokenizer(), SPECIAL)
    return PromptMaker(Template(text, tokenizer, special), model, how, limit).prompt(row, 7)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: made("no mask"), "has no mask"),
        (lambda: made('w1 [SEP] {"mask"}'), 'writes the special token \'[SEP]\' as words: write {"special": "[SEP]"}'),
        (lambda: made('w1 [MASK] {"mask"}'), 'write {"mask"}'),
        (lambda: made('{"special": "<sepp>"} {"mask"}'), "did you mean '<sep>'"),
        (lambda: made('{"placeholder": "text_b"} {"mask"}'), "row 7 has no field 'text_b'; did you mean 'text_a'"),
        (lambda: made('{"meta": "x"} {"mask"}', row={"meta": {"x": None}}), "field 'x' of row 7 is a NoneType"),
        (lambda: made('w1 w2 w3 {"mask"}', limit=5), "the prompt of row 7 has 6 tokens that may not be cut, and only 5"),
        (lambda: made('{"placeholder": "text_a"} {"mask"}', limit=5, how="never"), "has 1 tokens more than the 5"),
        (lambda: made('{"mask"} {"mask"}', "decoder"), "give one mask, at the end"),
        (lambda: made('{"mask"} {"placeholder": "text_a"}', "decoder"), "put the mask at the end"),
        (lambda: made('{"mask"}', "decoder"), "no token in front of the mask"),
        (lambda: PromptMaker(Template('{"mask"}', byte_tokenizer()), "encoder"), "has no mask token"),
        (lambda: Template('{"mask"}', object()), "the tokenizer is a object"),
        (lambda: Template('{"mask"}', word_tokenizer(), {"maks": "[MASK]"}), "did you mean 'mask'"),
        (lambda: Template('{"mask"}', word_tokenizer(), {"mask": "<m>"}), "'<m>' is not in the tokenizer's vocabulary"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)
