"""Reads the fields of a request's body, each of the kind that it must be; what nobody reads is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import Any

from bmgraph.serving.api_error import refused
from bmgraph.utils.did_you_mean import did_you_mean


def parsed(body: bytes) -> Fields:
    """The fields of a body. Raises ApiError for what is no JSON object."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (
        ValueError,
        RecursionError,
    ) as error:  # also bytes that are no text, and numbers of thousands of digits
        raise refused(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from error
    if not isinstance(found, dict):
        raise refused('the body is not a JSON object: give one, such as {"model": ...}', code="invalid_json")
    return Fields(found)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


class Fields:
    """The fields of one object; each method reads one, which null stands for too. They raise ApiError naming the field."""

    def __init__(self, values: dict[str, Any], place: str = "") -> None:
        self._values, self._place, self._read = values, place, set[str]()

    @property
    def names(self) -> list[str]:
        """The names of all fields that are there."""
        return list(self._values)

    def value(self, name: str) -> Any:
        """A field as it is; None if it is not there."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str:
        """A text that must be there."""
        found = self.value(name)
        if found is None:
            raise refused(f"{self._place}{name} is missing", name)
        if not isinstance(found, str):
            raise self._wrong(name, "a text")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        found = self.value(name)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self._wrong(name, "true or false")
        return found

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds; None if it is not there."""
        found = self.value(name)
        if found is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not low <= found <= high:
            raise self._wrong(name, f"a whole number from {low} to {high}")
        return found

    def real(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds; None if it is not there."""
        found = self.value(name)
        if found is None:
            return None
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not number or not math.isfinite(found) or not low <= found <= high:
            raise self._wrong(name, f"a number from {low:g} to {high:g}")
        return float(found)

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty; () if it is not there."""
        found = self.value(name)
        given = [] if found is None else [found] if isinstance(found, str) else found
        if not isinstance(given, list) or not all(isinstance(item, str) and item for item in given):
            raise self._wrong(name, "a text, or a list of texts")
        if len(given) > most:
            raise refused(f"{self._place}{name} has {len(given)} texts: give {most} at most", name)
        return tuple(given)

    def inner(self, name: str) -> Fields | None:
        """The fields of an object; None if it is not there."""
        found = self.value(name)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self._wrong(name, "an object")
        return Fields(found, f"{self._place}{name}.")

    def ignore(self, *names: str) -> None:
        """Take fields that say nothing about the answer."""
        self._read.update(names)

    def refuse(self, names: Collection[str], why: str, neutral: Collection[object] = ()) -> None:
        """Raise ApiError for fields that would change the answer in a way that there is not; `neutral` values would not."""
        for name in names:
            found = self.value(name)
            if found is not None and not any(found == item and type(found) is type(item) for item in neutral):
                raise refused(f"{self._place}{name} is not supported: {why}", name, "unsupported_parameter")

    def done(self, other: Collection[str] = ()) -> None:
        """Raise ApiError for a field that nothing has read."""
        for name in self._values:
            if name not in self._read:
                hint = did_you_mean(name, [*self._read, *other])
                raise refused(
                    f"there is no field {self._place}{name[:80]!r}{hint}", name[:80], "unknown_parameter"
                )

    def _wrong(self, name: str, expected: str) -> Exception:
        shown = json.dumps(self._values[name])
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return refused(f"{self._place}{name} is {shown}: give {expected}", name)
