"""What a captured model computes with its weights, as lines of text that stay with the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from bmgraph.errors import BundleError

CONTEXT = 30
"""How many characters before a difference an error shows."""


@dataclass(frozen=True)
class Computation:
    """Lines `name = expression`, and the versions of the libraries that captured them.

    `name` is the first weight of a call that reads weights, or `#hash` for a value that is made of several others. The lines are
    equal for captures of one model with other inputs, sizes, modes or losses; see `bmgraph.analysis.computation_lines`.
    """

    lines: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether it is known."""
        return bool(self.lines)

    def difference(self, other: Computation) -> str:
        """The first line in which this computation differs from another, with both; empty if none does.

        Weights that only one of the two reads are left out: a capture without labels may lack a head.
        """
        common = self._weights() & other._weights()
        here, there = self._about(common), other._about(common)
        for line, second in zip_longest(here, there, fillvalue="nothing"):
            if line != second:
                return _difference(line, second)
        return ""

    def _weights(self) -> set[str]:
        return {line.partition(" = ")[0] for line in self.lines if not line.startswith("#")}

    def _about(self, weights: set[str]) -> list[str]:
        """The lines of some weights, and those that they need."""
        kept: list[str] = []
        needed: set[str] = set()
        for line in reversed(self.lines):
            name, _, text = line.partition(" = ")
            if name in weights or name in needed:
                kept.append(line)
                needed |= _references(text)
        return kept[::-1]

    def as_json(self) -> dict[str, Any]:
        """The lines and versions as values of JSON."""
        return {"lines": list(self.lines), "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, data: Any) -> Computation:
        """The inverse of `as_json`. Raises BundleError for values of other types."""
        valid = (
            isinstance(data, dict)
            and isinstance(data.get("lines"), list)
            and isinstance(data.get("versions"), dict)
            and all(isinstance(line, str) for line in data["lines"])
            and all(isinstance(text, str) for pair in data["versions"].items() for text in pair)
        )
        if not valid:
            raise BundleError(
                "what the captured model computes must be a list of lines, with the versions by package"
            )
        return cls(tuple(data["lines"]), dict(data["versions"]))


def _difference(line: str, other: str) -> str:
    """Two lines from a little before they differ."""
    name, _, text = line.partition(" = ")
    second = other.partition(" = ")[2]
    differs = next((at for at, (one, two) in enumerate(zip(text, second)) if one != two), 0)
    start = max(differs - CONTEXT, 0)
    parts = [f"{'...' if start else ''}{item[start : start + 4 * CONTEXT]}" for item in (text, second)]
    where = "between two weights" if name.startswith("#") else f"in front of {name}"
    return f"{where} {parts[0]!r} here, {parts[1]!r} there"


def _references(text: str) -> set[str]:
    """The `#hash` parts of an expression."""
    return {f"#{part[:8]}" for part in text.split("#")[1:]}
