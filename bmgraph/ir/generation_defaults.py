"""What a model's own generation config says: the ids that texts start, end and are padded with, and how long they get."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationDefaults:
    """The values that `generate` takes where a caller gives none.

    start: the id that a decoder with an encoder starts with. eos: the ids that end a text. pad: the id in the place of
    padding. max_new_tokens, or max_length, which counts the prompt (of a decoder with an encoder: its start id) too.
    unserved: what the config asks for and engines do not do, such as beams; told in the report.
    """

    start: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    unserved: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The values as JSON."""
        return {**asdict(self), "eos": list(self.eos), "unserved": list(self.unserved)}

    @classmethod
    def from_json(cls, data: object) -> GenerationDefaults:
        """The inverse of `as_json`; raises ValueError for anything else."""
        if not isinstance(data, dict) or not set(data) <= set(cls.__dataclass_fields__):
            raise ValueError(f"the generation defaults are {data!r}: expected an object of their fields")
        numbers = {name: data.get(name) for name in ("start", "pad", "max_new_tokens", "max_length")}
        eos, unserved = data.get("eos", []), data.get("unserved", [])
        if not isinstance(eos, list) or not all(map(_is_count, eos)):
            raise ValueError(f"the ids that end a text are {eos!r}: expected whole numbers")
        if not isinstance(unserved, list) or not all(isinstance(item, str) for item in unserved):
            raise ValueError(f"unserved settings of generation are {unserved!r}: expected texts")
        for name, value in numbers.items():
            if value is not None and not _is_count(value):
                raise ValueError(f"{name} of generation is {value!r}: expected a whole number or nothing")
        return cls(eos=tuple(eos), unserved=tuple(unserved), **numbers)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
