"""The text form of passes, written and parsed: `quantize{scheme=int8,exclude=[*.lm_head]}`, separated by commas.

Options at their defaults are left out. Where a later version of a pass has other defaults, histories name the version that
wrote them, `quantize@2{...}`, and a text without one is of version 1; a text that a user writes without one is of the newest.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bmgraph.errors import InputError
from bmgraph.ir.pass_record import VERSION
from bmgraph.utils.did_you_mean import did_you_mean

if TYPE_CHECKING:
    from bmgraph.pass_manager.pass_base import Pass

_BARE = re.compile(r"[A-Za-z_*][A-Za-z0-9_.*/:\-]*\Z")
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\]|\\.)*")|(?P<bare>[A-Za-z0-9_.*/:+\-@]+)|(?P<mark>[{}\[\],=|]))"""
)
_WORDS: dict[str, Any] = {"null": None, "true": True, "false": False}
_NUMBER = re.compile(r"[+-]?(?:\d+|\d+\.\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf|nan)\Z")

_DEPTH = 8


def name_of(kind: type[Pass]) -> str:
    """The name of a pass in its text form: the class name in lower case."""
    return kind.__name__.lower()


def pass_text(item: Pass) -> str:
    """The text form of a pass; options at their defaults are left out, those that can be given by place come first."""
    given = [
        f"{field.name}={_value_text(getattr(item, field.name))}"
        for field in sorted(dataclasses.fields(item), key=lambda field: bool(field.kw_only))
        if getattr(item, field.name) != field.default
        or type(getattr(item, field.name)) is not type(field.default)
    ]
    return name_of(type(item)) + (f"{{{','.join(given)}}}" if given else "")


def recorded_text(item: Pass) -> str:
    """The text form of a pass for a history: with the version of its defaults, unless that is the first."""
    kind = type(item)
    name, text = name_of(kind), pass_text(item)
    return text if kind.version == 1 else f"{name}{VERSION}{kind.version}{text.removeprefix(name)}"


def _value_text(value: Any) -> str:
    if isinstance(value, str):
        plain = _BARE.match(value) and value not in _WORDS and not _NUMBER.match(value)
        return value if plain else json.dumps(value)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{','.join(map(_value_text, value))}]"
    raise InputError(
        f"an option of a pass is a {type(value).__name__}: options are numbers, strings and tuples of them"
    )


def parse_passes(text: str, known: Mapping[str, type[Pass]], recorded: bool = False) -> list[Pass]:
    """The passes that a text names; `known` maps names to classes.

    A pass without a version has the newest defaults, or, where the text was `recorded` in a history, those of version 1.

    Raises InputError for bad syntax, an unknown pass or option (with the nearest known name), a version that the pass does
    not have, or a wrong value.
    """
    found = _read(text)
    for name, options in found:
        for key, values in options.items():
            if len(values) > 1:
                raise InputError(
                    f"passes {text!r}: {name} is given {len(values)} values of {key!r}: only a pass that chooses takes several"
                )
    return [
        _build(name, {key: values[0] for key, values in options.items()}, known, recorded)
        for name, options in found
    ]


def parse_alternatives(text: str, known: Mapping[str, type[Pass]]) -> list[list[Pass]]:
    """The lists of passes that a text names in which options have several values, as in `quantize{scheme=int4,group=64|128}`: one
    list for each choice of a value for every option, the first values first. Raises as `parse_passes`."""
    made = [
        [
            _build(name, dict(zip(options, values)), known, recorded=False)
            for values in itertools.product(*options.values())
        ]
        for name, options in _read(text)
    ]
    return [list(chosen) for chosen in itertools.product(*made)]


def _read(text: str) -> list[tuple[str, dict[str, list[Any]]]]:
    """The names of passes in a text, with the values of each option."""
    tokens = _tokens(text)
    result: list[tuple[str, dict[str, list[Any]]]] = []
    position = 0
    while position < len(tokens):
        name, position = _expect_word(tokens, position, text)
        options: dict[str, list[Any]] = {}
        if position < len(tokens) and tokens[position] == ("mark", "{"):
            options, position = _options(tokens, position + 1, text)
        result.append((name, options))
        if position < len(tokens):
            if tokens[position] != ("mark", ","):
                raise InputError(
                    f"passes {text!r}: expected a comma after {name!r}, found {tokens[position][1]!r}"
                )
            position += 1
            if position == len(tokens):
                raise InputError(f"passes {text!r} end with a comma")
    return result


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        found = _TOKEN.match(stripped, position)
        if found is None:
            raise InputError(f"passes {text!r}: cannot read {stripped[position:][:20]!r}")
        kind = found.lastgroup
        assert kind is not None
        tokens.append((kind, found.group(kind)))
        position = found.end()
    return tokens


def _expect_word(tokens: list[tuple[str, str]], position: int, text: str) -> tuple[str, int]:
    if position >= len(tokens) or tokens[position][0] != "bare":
        found = tokens[position][1] if position < len(tokens) else "the end"
        raise InputError(f"passes {text!r}: expected a name, found {found!r}")
    return tokens[position][1], position + 1


def _expect(tokens: list[tuple[str, str]], position: int, mark: str, text: str) -> int:
    if position >= len(tokens) or tokens[position] != ("mark", mark):
        found = tokens[position][1] if position < len(tokens) else "the end"
        raise InputError(f"passes {text!r}: expected {mark!r}, found {found!r}")
    return position + 1


def _options(tokens: list[tuple[str, str]], position: int, text: str) -> tuple[dict[str, list[Any]], int]:
    options: dict[str, list[Any]] = {}
    while position < len(tokens) and tokens[position] != ("mark", "}"):
        if options:
            position = _expect(tokens, position, ",", text)
        key, position = _expect_word(tokens, position, text)
        position = _expect(tokens, position, "=", text)
        if key in options:
            raise InputError(f"passes {text!r}: option {key!r} is given twice")
        value, position = _value(tokens, position, text, 0)
        options[key] = [value]
        while position < len(tokens) and tokens[position] == ("mark", "|"):
            value, position = _value(tokens, position + 1, text, 0)
            options[key].append(value)
    return options, _expect(tokens, position, "}", text)


def _value(tokens: list[tuple[str, str]], position: int, text: str, depth: int) -> tuple[Any, int]:
    if depth > _DEPTH:
        raise InputError(f"passes {text!r}: lists are nested too deeply")
    if position < len(tokens) and tokens[position] == ("mark", "["):
        items: list[Any] = []
        position += 1
        while position < len(tokens) and tokens[position] != ("mark", "]"):
            if items:
                position = _expect(tokens, position, ",", text)
            item, position = _value(tokens, position, text, depth + 1)
            items.append(item)
        return tuple(items), _expect(tokens, position, "]", text)
    if position < len(tokens) and tokens[position][0] == "text":
        try:
            return json.loads(tokens[position][1]), position + 1
        except json.JSONDecodeError as error:
            raise InputError(f"passes {text!r}: cannot read the string {tokens[position][1]}") from error
    word, position = _expect_word(tokens, position, text)
    if word in _WORDS:
        return _WORDS[word], position
    if _NUMBER.match(word):
        return (int(word) if re.fullmatch(r"[+-]?\d+", word) else float(word)), position
    return word, position


def _build(name: str, options: dict[str, Any], known: Mapping[str, type[Pass]], recorded: bool) -> Pass:
    name, marked, version = name.partition(VERSION)
    if name not in known:
        raise InputError(f"no pass is called {name!r}{_nearest(name, known)}")
    kind = known[name]
    if marked or recorded:
        version = version if marked else "1"
        options = _defaults(kind, version) | known_options(kind, options)
        options = dict(kind.of_version(int(version), options))
    try:
        return kind(**options)
    except TypeError as error:
        raise InputError(f"pass {name!r}: {error}") from error


def _defaults(kind: type[Pass], version: str) -> dict[str, Any]:
    """The defaults of a version that are others than those of the newest."""
    if version not in map(str, range(1, kind.version + 1)):
        raise InputError(
            f"pass {name_of(kind)!r} has no version {version!r}: this bmgraph knows 1 to {kind.version}, and a newer one may "
            "have written this"
        )
    found: dict[str, Any] = {}
    for earlier in range(kind.version - 1, int(version) - 1, -1):
        found |= kind.former_defaults.get(earlier, {})
    return found


def known_options(kind: type[Pass], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a pass, those by the names of other libraries under the names that they have here.

    Raises InputError for one that the pass does not have, and for one that is given by two names.
    """
    known = inspect.signature(kind.__init__).parameters
    takes_all = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in known.values())
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in options.items():
        name = key if key in known else kind.other_names.get(key, key)
        if name not in known and not takes_all:
            raise InputError(unknown_option(kind, key))
        if name in found:
            raise InputError(
                f"pass {name_of(kind)!r} is given {given[name]!r} and {key!r}, which are one option: give one of them"
            )
        found[name], given[name] = value, key
    return found


def unknown_option(kind: type[Pass], key: str) -> str:
    """What to say of an option that a pass does not have: the one that was meant, and all others."""
    names = [field.name for field in dataclasses.fields(kind)]
    if key in kind.not_options:
        return f"pass {name_of(kind)!r} has no option {key!r}: {kind.not_options[key]}"
    return f"pass {name_of(kind)!r} has no option {key!r}{_nearest(key, names)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"{did_you_mean(name, known)} (known: {', '.join(sorted(known))})"
