"""The language of templates: text with nodes in braces, such as `{"placeholder": "text_a"} It was {"mask"}.`

The nodes and keys are those of OpenPrompt (Ding et al. 2021, arXiv:2111.01998). A template is parsed, never evaluated: values
are strings, whole numbers, True, False, None and lists of strings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from bmgraph.errors import InputError
from bmgraph.prompting.post_processing import POST_PROCESSING
from bmgraph.utils.did_you_mean import did_you_mean

KINDS = ("placeholder", "meta", "mask", "soft", "special", "text")
"""The key that says what a node is."""

OPTIONS = ("soft_id", "duplicate", "same", "shortenable", "post_processing", "add_prefix_space")
FIELDS = ("placeholder", "meta")
NETWORKS = ("mlp", "lstm")
"""What may make the embeddings of soft tokens: the option `encoder` of `SoftTokens`."""
LONGEST, MOST_SOFT = 100_000, 10_000
"""Characters of a template and copies of a soft token at most."""

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<number>-?\d{1,9}(?![\w.]))|(?P<name>[A-Za-z_]\w*)|(?P<mark>[{}:,\[\]])|(?P<other>\S))""",
    re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\", "/": "/"}
_CONSTANTS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}

Fail = Callable[[str], NoReturn]
"""Raises an error at the place of a node."""


@dataclass(frozen=True)
class Node:
    """A part of a template.

    kind: one of `KINDS`. value: the name of a field, a text or a special token; None for a mask, and for a soft token that
    starts from random words. space: whether a space stands in front. shortenable: whether truncation may cut it. A soft node
    stands for `duplicate` tokens, all the `same` one or each another; those with the same `soft_id` are the same tokens.
    """

    kind: str
    value: str | None
    space: bool = False
    shortenable: bool = False
    post_processing: tuple[str, ...] = ()
    soft_id: int | None = None
    duplicate: int = 1
    same: bool = False

    def processed(self, text: str) -> str:
        """A field's text as the template writes it."""
        for name in self.post_processing:
            text = POST_PROCESSING[name](text)
        return text


def parse(text: str) -> tuple[Node, ...]:
    """The nodes of a template; raises InputError, with the place, where it is not valid."""
    if not isinstance(text, str):
        raise InputError(f"the template is a {type(text).__name__}: give its text")
    if len(text) > LONGEST:
        raise InputError(f"the template has {len(text)} characters: {LONGEST} at most")
    nodes: list[Node] = []
    place = 0
    while place < len(text):
        begin = place
        while place < len(text) and text[place] == " ":
            place += 1
        if place == len(text):
            break
        space = place > begin
        if text[place] == "}":
            _fail(text, place, 'a "}" without "{": write {"text": "}"} for the letter')
        if text[place] == "{":
            reader = _Reader(text, place)
            nodes.append(_node(reader.node(), space, partial(_fail, text, place)))
            place = reader.place
        else:
            end = min(
                (found for found in (text.find(mark, place) for mark in "{}") if found >= 0),
                default=len(text),
            )
            words = text[place:end].rstrip(" ")
            nodes.append(Node("text", words, space))
            place += len(words)
    return tuple(nodes)


def _fail(text: str, place: int, what: str) -> NoReturn:
    raise InputError(f"the template is not valid at character {place} ({text[place : place + 40]!r}): {what}")


class _Reader:
    """Reads one node in braces; `place` is behind what was read."""

    def __init__(self, text: str, place: int) -> None:
        self._text, self.place = text, place

    def node(self) -> dict[str, Any]:
        """The keys of a node and their values; None for a key without a value, as in `{"mask"}`."""
        self._expect("{")
        keys: dict[str, Any] = {}
        while True:
            start = self.place
            kind, found = self._next()
            if kind == "mark" and found == "}" and not keys:
                _fail(self._text, start, f"a node without a key: give one of {', '.join(KINDS)}")
            if kind == "mark" and found == "}":
                return keys  # behind a comma
            if kind != "string":
                self._refuse(start, found, "a key in quotes")
            key = _unquoted(found)
            if key not in (*KINDS, *OPTIONS):
                near = did_you_mean(key, (*KINDS, *OPTIONS))
                _fail(self._text, start, f"unknown key {key!r}{near} (keys: {', '.join((*KINDS, *OPTIONS))})")
            if key in keys:
                _fail(self._text, start, f"the key {key!r} stands twice in one node")
            mark = self._mark()
            keys[key] = None
            if mark == ":":
                keys[key] = self._value(key)
                mark = self._mark()
            if mark == "}":
                return keys
            if mark != ",":
                _fail(self._text, self.place - 1, 'expected "," or "}"')

    def _value(self, key: str) -> Any:
        start = self.place
        kind, found = self._next()
        if kind == "string":
            return _unquoted(found)
        if kind == "number":
            return int(found)
        if kind == "name" and found in _CONSTANTS:
            return _CONSTANTS[found]
        if kind == "mark" and found == "[":
            return self._strings()
        if key == "post_processing":
            names = ", ".join(POST_PROCESSING)
            _fail(
                self._text,
                start,
                f'{found!r} is code, and nothing in a template is run: name one or more of {names}, as in "post_processing": "strip"',
            )
        return self._refuse(
            start, found, "a string in quotes, a whole number, True, False, None or a list of strings"
        )

    def _strings(self) -> list[str]:
        items: list[str] = []
        while True:
            start = self.place
            kind, found = self._next()
            if kind == "mark" and found == "]":
                return items
            if kind != "string":
                self._refuse(start, found, "a string in quotes")
            items.append(_unquoted(found))
            mark = self._mark()
            if mark == "]":
                return items
            if mark != ",":
                _fail(self._text, self.place - 1, 'expected "," or "]"')

    def _mark(self) -> str:
        start = self.place
        kind, found = self._next()
        if kind != "mark":
            self._refuse(start, found, '":", "," or "}"')
        return found

    def _expect(self, mark: str) -> None:
        assert self._next() == ("mark", mark)

    def _next(self) -> tuple[str, str]:
        found = _TOKEN.match(self._text, self.place)
        if found is None:
            _fail(self._text, self.place, 'a node that no "}" ends')
        self.place = found.end()
        kind = found.lastgroup
        assert kind is not None
        return kind, found[kind]

    def _refuse(self, place: int, found: str, wanted: str) -> NoReturn:
        _fail(self._text, place, f"found {found!r}: expected {wanted}")


def _unquoted(found: str) -> str:
    def letter(match: re.Match[str]) -> str:
        body = match[1]
        return chr(int(body[1:], 16)) if len(body) == 5 else _ESCAPES.get(body, match[0])

    return _ESCAPE.sub(letter, found[1:-1])


def _node(keys: Mapping[str, Any], space: bool, fail: Fail) -> Node:
    """A node of its keys."""
    kinds = [key for key in KINDS if key in keys]
    if not kinds and "soft_id" in keys:
        kinds = ["soft"]
    if len(kinds) != 1:
        told = " and ".join(map(repr, kinds)) or "none"
        fail(f"a node is of one kind, and this is of {told}: choose one of {', '.join(KINDS)}")
    (kind,) = kinds
    value = keys.get(kind)
    if kind == "mask" and value is not None:
        fail(f'a mask has no value, and this has {value!r}: write {{"mask"}}')
    if kind not in ("mask", "soft") and (not isinstance(value, str) or not value):
        fail(f"{kind!r} needs a text, as in {{{kind!r}: ...}}: found {value!r}")
    if kind == "soft" and value is not None and not isinstance(value, str):
        fail(f"'soft' takes a text that the tokens start as, or None: found {value!r}")
    for key in ("soft_id", "duplicate", "same"):
        if key in keys and kind != "soft":
            fail(f"{key!r} is for soft tokens, and this is a {kind}")
    if kind == "soft" and keys.get("post_processing") in NETWORKS:
        fail(
            f"a network ('post_processing': {keys['post_processing']!r}) of single soft tokens is not built: leave it out, and let one "
            f"network make all of the template's, SoftTokens(task.template.soft_words, encoder={keys['post_processing']!r})"
        )
    if "post_processing" in keys and kind not in FIELDS:
        fail(f"'post_processing' is for {' and '.join(FIELDS)}, and this is a {kind}")
    cut = _boolean(keys, "shortenable", kind == "placeholder", fail)
    if cut and kind in ("mask", "soft", "special"):
        fail(f"a {kind} cannot be shortenable")
    return Node(
        kind, value or None, _space(keys, space, fail), cut, _post_processing(keys, fail),
        _whole(keys, "soft_id", None, fail), _duplicate(keys, value, fail), _boolean(keys, "same", False, fail),
    )  # fmt: skip


def _boolean(keys: Mapping[str, Any], key: str, default: bool, fail: Fail) -> bool:
    found = keys.get(key, default)
    if isinstance(found, str) and found in ("True", "False"):  # as OpenPrompt's own error text has it
        found = found == "True"
    if not isinstance(found, bool):
        fail(f"{key!r} is True or False: found {found!r}")
    return found


def _whole(keys: Mapping[str, Any], key: str, default: int | None, fail: Fail) -> int | None:
    found: int | None = keys.get(key, default)
    if key in keys and (type(found) is not int or found < 1):
        fail(f"{key!r} is a whole number of 1 or more: found {found!r}")
    return found


def _duplicate(keys: Mapping[str, Any], value: str | None, fail: Fail) -> int:
    count = _whole(keys, "duplicate", 1, fail)
    assert count is not None
    if count > MOST_SOFT:
        fail(f"'duplicate' is {count}: {MOST_SOFT} at most")
    if value is not None and ("duplicate" in keys or "same" in keys):
        fail("'duplicate' and 'same' are for soft tokens without a text: a text has its own number of tokens")
    return count


def _post_processing(keys: Mapping[str, Any], fail: Fail) -> tuple[str, ...]:
    given = keys.get("post_processing")
    names = [given] if isinstance(given, str) else given or []
    if not isinstance(names, list):
        fail(f"'post_processing' is a name or a list of names: found {given!r}")
    for name in names:
        if name not in POST_PROCESSING:
            known = ", ".join(POST_PROCESSING)
            fail(
                f"unknown post-processing {name!r}{did_you_mean(name, POST_PROCESSING)} (known: {known}; nothing in a template is run)"
            )
    return tuple(names)


def _space(keys: Mapping[str, Any], space: bool, fail: Fail) -> bool:
    given = keys.get("add_prefix_space", space)
    if given in ("", " "):
        given = given == " "
    if not isinstance(given, bool):
        fail(f"'add_prefix_space' is True or False: found {given!r}")
    return given
