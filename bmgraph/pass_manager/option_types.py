"""Checks options against the annotations of a pass's fields."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "None",
}
"""What users call a type."""


def fits(value: object, annotation: object) -> bool:
    """Whether a value is of an annotated type: numbers, texts, tuples of them, unions and literals.

    A whole number is a number, too; true and false are no numbers. Types that are not known here fit everything.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, item) for item in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(fits(item, inner[0]) for item in value)
        return len(value) == len(inner) and all(fits(*pair) for pair in zip(value, inner))
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool, NoneType):
        return isinstance(value, annotation)
    return True


def type_in_words(annotation: object) -> str:
    """An annotated type for a message: "a whole number", "a tuple of texts"."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(map(type_in_words, inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is tuple:
        if len(inner) == 2 and inner[1] is Ellipsis:
            return f"a tuple, each item {type_in_words(inner[0])}"
        return f"a tuple of {', '.join(map(type_in_words, inner))}"
    return WORDS.get(annotation, str(annotation))
