"""Answers that are JSON, or JSON of a schema: each step leaves only ids that go on with such a text (by llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from bmgraph.errors import InputError
from bmgraph.runtime.generation.option_checks import shown
from bmgraph.runtime.generation.penalties import Array
from bmgraph.runtime.generation.tokenizer import FastTokenizer, Tokenizer

LONGEST = 2**16
"""Characters of a schema at most."""

LIMITS: dict[str, Any] = {
    "max_items_in_row": 2000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000,
    "max_lexer_states": 20_000, "max_grammar_size": 100_000,
}  # fmt: skip
"""What the library may spend on one schema: tens of megabytes, and tens of milliseconds of a step."""

WHITESPACE = r"[\x20\x0A]{0,8}"
"""What may stand between two parts: a model that likes white space would else write nothing more."""


def why_no_json() -> str:
    """Why answers cannot be bound to JSON in this environment; empty if they can."""
    return "" if find_spec("llguidance") else 'JSON needs the library llguidance: pip install -e ".[json]"'


class JsonGrammar:
    """Any JSON object (`True`), or what a JSON schema allows; `ends` are the ids that end a text, `vocabulary` the number V of logits.

    Raises InputError for another value, a schema that is not valid, larger than it may be or of keywords that are not known, where the
    library is missing, no id ends a text, or the tokenizer is none of the `tokenizers` library, or writes ids in a way that llguidance
    does not know (a WordPiece's). Nothing is fetched for a schema.
    """

    def __init__(self, given: Any, tokenizer: Tokenizer | None, ends: Sequence[int], vocabulary: int) -> None:
        if given is not True and not isinstance(given, Mapping):
            raise InputError(f"json={shown(given)}: give True for any object, or a JSON schema as a dict")
        missing = why_no_json()
        if missing:
            raise InputError(missing)
        if not isinstance(tokenizer, FastTokenizer):
            raise InputError(
                "JSON needs a tokenizer of the library tokenizers, whose ids it reads: compile with resources={'tokenizer': ...}"
            )
        if not ends:
            raise InputError(
                "JSON needs an id that ends a text, and neither the model nor the tokenizer says one: give eos="
            )
        self._matcher = _matcher(_schema(given), tokenizer.text, tuple(ends), vocabulary)

    def row(self) -> JsonRow:
        """A row that begins."""
        return JsonRow(self._matcher.deep_copy())


class JsonRow:
    """A row that writes JSON."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def scores(self, logits: Array) -> Array:
        """Logits f[V] with minus infinity for ids that may not come next. Raises InputError where that leaves none, or the schema takes
        more than it may."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        found: Array = np.where(allowed, logits.astype(np.float64), -np.inf)
        if found.max() == -np.inf:
            raise InputError("no id is left that goes on with the JSON: loosen the schema or the penalties")
        return found

    def add(self, chosen: int) -> None:
        """The row goes on with an id, or ends. Raises InputError where the schema takes more than it may."""
        self._matcher.consume_token(chosen)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the JSON schema cannot be followed: {_first_line(self._matcher.get_error())}")


def _schema(given: Any) -> str:
    try:
        text = json.dumps({"type": "object"} if given is True else dict(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is no JSON: {str(error)[:200]}") from error
    if len(text) > LONGEST:
        raise InputError(f"the JSON schema has {len(text)} characters: {LONGEST} are allowed")
    return text


def _matcher(schema: str, tokenizer: str, ends: tuple[int, ...], vocabulary: int) -> Any:
    import llguidance

    try:
        known = _library_tokenizer(tokenizer, ends, vocabulary)
    except ValueError as error:
        raise InputError(
            f"JSON: llguidance does not know how this tokenizer writes its ids ({_first_line(str(error))[:100]}): one of bytes or with "
            "spaces as a mark is needed"
        ) from error
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITESPACE, "lenient": False}
        )
        limits = llguidance.LLParserLimits(**LIMITS)
        found = llguidance.LLMatcher(known, grammar, log_level=0, limits=limits)
        message = str(found.get_error())
    except BaseException as error:  # the library's panics are no Exceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        message = str(error) or type(error).__name__
    if message:
        raise InputError(f"the JSON schema is refused: {_first_line(message)}")
    return found


@lru_cache(maxsize=4)
def _library_tokenizer(text: str, ends: tuple[int, ...], vocabulary: int) -> Any:
    """The library's own form, which takes a while to make."""
    import llguidance
    from tokenizers import Tokenizer

    count = max(vocabulary, Tokenizer.from_str(text).get_vocab_size())
    return llguidance.LLTokenizer(_with_known_decoder(text), n_vocab=count, eos_token=list(ends))


def _with_known_decoder(text: str) -> str:
    """A tokenizer's JSON with the steps of a decoder that writes a mark for each space, which the library knows, in the place of the one
    step that has a name."""
    made = json.loads(text)
    decoder = made.get("decoder") or {}
    if decoder.get("type") != "Metaspace":
        return text
    space = {"type": "Replace", "pattern": {"String": decoder["replacement"]}, "content": " "}
    made["decoder"] = {
        "type": "Sequence",
        "decoders": [
            space,
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return json.dumps(made)


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0][:300] if message.strip() else "unknown"
