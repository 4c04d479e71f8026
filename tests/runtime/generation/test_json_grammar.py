"""Answers bound to JSON: whatever the model likes, what ends by itself is of the schema; hostile schemas cost little and say so."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest

from bmgraph.errors import InputError
from bmgraph.runtime.generation import json_grammar
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from tests.helpers.asgi import call
from tests.helpers.counting_decoder import IDS, CountingEngine

CHARACTERS = ["<end>", *'{}[]":,abtruefls12n']
"""The tokens of a model of 20 ids."""

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2, 12]}, "r": {"type": "array", "items": {"const": "t"}, "maxItems": 2}},
    "required": ["a", "b", "r"],
    "additionalProperties": False,
}  # fmt: skip


def letters() -> FastTokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({text: place for place, text in enumerate(CHARACTERS)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    return FastTokenizer(made.to_str(), (0,))


def spaced(unigram: bool = True) -> FastTokenizer:
    """A tokenizer as T5's or, without `unigram`, BERT's, with the same characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<end>", *(f"▁{text}" if text == "1" else text for text in CHARACTERS[1:])]
    if unigram:
        made = Tokenizer(models.Unigram([(text, -1.0) for text in pieces], 0))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        made = Tokenizer(
            models.WordPiece({text: place for place, text in enumerate(pieces)}, unk_token="<end>")
        )
        made.decoder = decoders.WordPiece()
    made.add_special_tokens(["<end>"])
    return FastTokenizer(made.to_str(), (0,))


@pytest.fixture
def engine() -> Any:
    pytest.importorskip("llguidance")
    assert len(CHARACTERS) == IDS
    found = CountingEngine(limit=None)
    found.tokenizer = letters()
    yield found
    found.stop_batching()


def follows(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == ["a", "b", "r"]
        and found["a"] in (True, False)
        and found["b"] in (1, 2, 12)
        and found["r"] in ([], ["t"], ["t", "t"])
    )


def test_answers_follow_the_schema(engine: Any) -> None:
    asked: dict[str, Any] = {"json": SCHEMA, "max_new_tokens": 80, "temperature": 1.0}
    texts = engine.generate("tru", **asked, seed=1, n=12)
    assert all(map(follows, texts))
    assert len(set(texts)) > 3
    made = [engine.submit("tru", **asked, seed=1, answer=number) for number in range(12)]
    assert [item.result(60).text for item in made] == texts
    assert {item.finish_reason for item in made} == {"stop"}
    plain = engine.generate("tru", json=True, max_new_tokens=400, temperature=1.0, seed=3)
    assert plain.startswith("{")
    cut = engine.submit("tru", json=SCHEMA, max_new_tokens=3).result(60)
    assert (cut.text[:2], cut.finish_reason) == ('{"', "length")


def test_a_tokenizer_with_marks_for_spaces(engine: Any) -> None:
    """Its 1 brings a space with it, which JSON allows."""
    engine.tokenizer = spaced()
    texts = engine.generate([3], json=SCHEMA, max_new_tokens=80, temperature=1.0, seed=1, n=6)
    assert all(map(follows, texts)), texts
    assert any(": 1" in text for text in texts), texts
    engine.tokenizer = spaced(unigram=False)
    with pytest.raises(
        InputError, match=r"JSON: llguidance does not know how this tokenizer writes its ids .*WordPiece"
    ):
        engine.generate([3], json=SCHEMA)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("object", "json='object': give True for any object, or a JSON schema as a dict"),
        ({"type": "thing"}, "the JSON schema is refused: "),
        ({"$ref": "http://127.0.0.1:1/x"}, "the JSON schema is refused: "),
        ({"$ref": "file:///etc/passwd"}, "the JSON schema is refused: "),
        ({"type": "string", "pattern": "("}, "the JSON schema is refused: "),
        ({"type": "object", "nothing": object()}, "the JSON schema is no JSON: "),
        ({"enum": ["a" * 70_000]}, "the JSON schema has 70014 characters: 65536 are allowed"),
    ],
)
def test_schemas_that_are_refused(engine: Any, schema: Any, message: str) -> None:
    for run in (engine.generate, engine.submit):
        with pytest.raises(InputError, match=message):
            run("tru", json=schema)


def test_hostile_schemas_cost_little(engine: Any) -> None:
    deep: Any = {"type": "string"}
    for _ in range(400):
        deep = {"type": "array", "items": deep}
    wide = {
        "type": "object",
        "properties": {f"a{item}": {"anyOf": [{"type": "string"}] * 3} for item in range(900)},
    }
    hostile = [
        {"type": "string", "pattern": "(a|b|ab|ba){1,900}(a|b){900}((a|b)*t(a|b){60})+"},
        {"allOf": [{"type": "string", "pattern": f"(a|b)*{item}(a|b){{12}}"} for item in "abtru"]},
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 50}}, "$ref": "#/$defs/a"},
        deep,
        wide,
    ]
    for schema in hostile:
        with suppress(InputError):  # some are refused, some only cut
            engine.submit("tru", json=schema, max_new_tokens=40, temperature=1.0, seed=0).result(120)
    assert follows(engine.generate("tru", json=SCHEMA, max_new_tokens=80, temperature=1.0, seed=1))


def test_what_is_missing_is_told(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="JSON needs an id that ends a text"):
        engine.generate("tru", json=True, eos=())
    with pytest.raises(InputError, match="choices with json: leave one of them out"):
        engine.generate("tru", json=True, choices=["a"])
    engine.tokenizer = None
    with pytest.raises(InputError, match="JSON needs a tokenizer of the library tokenizers"):
        engine.generate([1], json=True, eos=0)
    monkeypatch.setattr(json_grammar, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"JSON needs the library llguidance: pip install -e"):
        engine.generate([1], json=True, eos=0)


def test_the_server_gives_json(engine: Any) -> None:
    pytest.importorskip("starlette")
    from bmgraph.runtime.generation.chat_template import ChatTemplate
    from bmgraph.serving.app import Server
    from bmgraph.serving.options import ServeOptions
    from bmgraph.serving.served_models import ServedModels

    engine.tokenizer.chat = ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    server = Server(ServedModels(engine, "toy"), ServeOptions())
    asked = {"model": "toy", "messages": [{"role": "user", "content": "tru"}], "max_tokens": 80, "seed": 1}

    def answer(form: Any) -> Any:
        return call(server.app, "POST", "/v1/chat/completions", {**asked, "response_format": form})

    schema = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}
    assert follows(answer(schema).json["choices"][0]["message"]["content"])
    assert answer({"type": "json_object"}).json["choices"][0]["message"]["content"].startswith("{")
    assert answer({"type": "text"}).status == 200
    for wrong, message in (
        ({"type": "json_schema"}, "response_format.json_schema.schema is missing"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}, "the JSON schema is refused"),
        ({"type": "json_object", "schema": {}}, "there is no field response_format.'schema'"),
    ):
        found = answer(wrong)
        assert (found.status, message in found.error["message"]) == (400, True), found.text
    server.close()
