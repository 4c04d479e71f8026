"""What a template may do to a field before it is written: functions by name, so that nothing in a template is evaluated."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping

ENDS = (".", "!", "?")


def _uncapitalize(text: str) -> str:
    return text[:1].lower() + text[1:]


def _capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def _strip_punctuation(text: str) -> str:
    return text.rstrip(string.punctuation)


def _add_period(text: str) -> str:
    return f"{text}."


def _end_sentence(text: str) -> str:
    return text if text.rstrip().endswith(ENDS) else f"{text.rstrip()}."


def _one_line(text: str) -> str:
    return " ".join(text.split())


POST_PROCESSING: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "upper": str.upper,
    "title": str.title,
    "capitalize": _capitalize,
    "uncapitalize": _uncapitalize,
    "strip_punctuation": _strip_punctuation,
    "add_period": _add_period,
    "end_sentence": _end_sentence,
    "one_line": _one_line,
}
"""Name in a template -> what it does. `capitalize` and `uncapitalize` change the first letter alone, `strip_punctuation` the
end alone, `end_sentence` adds a period where there is no mark of an end, `one_line` makes every run of space one space."""
