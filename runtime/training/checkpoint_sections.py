"""Named sections of a checkpoint's manifest: what belongs to a training run and is no tensor, such as a loss scale or the
position in the data."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, TypeVar

from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import BundleError, InputError
from bmgraph.serialize.bundle import Bundle

SECTIONS = "sections"
"""Key in the manifest of a checkpoint: by name, the values of JSON that sections saved, a list by rank if `per_rank`."""

Value = TypeVar("Value", int, float, str, bool, list[Any], dict[str, Any])
Take = Callable[[], None]
"""Takes over what was checked; changes only then, and cannot fail."""


@dataclass(frozen=True)
class Found:
    """The object of JSON that a checkpoint holds for a section; not trusted, so every field is read through `get`."""

    where: str
    fields: dict[str, Any]

    def get(self, key: str, kind: type[Value], least: float | None = None) -> Value:
        """A field. Raises BundleError if it is missing, is not of this type, not finite, or less than `least`.

        An int is a float too; a bool is no int.
        """
        value = self.fields.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not isfinite(value)):
            raise BundleError(f"{self.where} holds {key}={value!r}, expected {kind.__name__}: it was altered")
        if least is not None and isinstance(value, (int, float)) and value < least:
            raise BundleError(f"{self.where} holds {key}={value!r}, expected {least} or more: it was altered")
        return value


class Section(ABC):
    """One section: what holds it gives it to `trainer.sections` before anything is saved or loaded."""

    name: ClassVar[str]
    """Key of the section in the manifest."""
    per_rank: ClassVar[bool] = False
    """Whether the section of each rank is saved; else that of rank 0."""

    @abstractmethod
    def saved(self) -> dict[str, Any]:
        """The fields to save, values of JSON, at the time when `save` is called; not collective."""

    @abstractmethod
    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        """Check what a checkpoint holds, and return what takes it over; not collective.

        `found` is empty for a checkpoint without the section; else it has one entry, or, if `per_rank`, one for each rank
        that saved it. What a user should be told is added to `notes`. Raises BundleError for what cannot be taken over.
        """


def saved_sections(sections: Sequence[Section], ranks: Ranks) -> dict[str, Any]:
    """The sections as the manifest holds them, on every rank; collective.

    Raises InputError, on all ranks, for a section that is not JSON.
    """
    names = [section.name for section in sections]
    assert len(set(names)) == len(names), names
    with ranks.fail_together():
        mine = {section.name: _object(section) for section in sections}
    texts = ranks.gather_texts(json.dumps(mine)) if sections else []
    by_rank = [json.loads(text) for text in texts]
    return {
        section.name: [own[section.name] for own in by_rank] if section.per_rank else by_rank[0][section.name]
        for section in sections
    }


def _object(section: Section) -> dict[str, Any]:
    """What a section saves, as JSON will give it back."""
    try:
        value = json.loads(json.dumps(section.saved(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{section.name!r} cannot be saved in a checkpoint as JSON: {error}") from error
    assert isinstance(value, dict), section.name
    return value


def checked_sections(sections: Sequence[Section], bundle: Bundle, notes: list[str]) -> list[Take]:
    """Check all sections of a checkpoint, and return what takes them over; not collective.

    Raises BundleError for one that is not valid. A section that this trainer does not have is told in `notes`.
    """
    found = bundle.manifest.get(SECTIONS, {})
    where = f"the manifest of {bundle.path}"
    if not isinstance(found, dict):
        raise BundleError(f"{where} holds no valid sections: it was altered")
    takes = []
    for section in sections:
        values = found.get(section.name, [])
        values = values if section.per_rank or section.name not in found else [values]
        if not isinstance(values, list) or not all(isinstance(item, dict) for item in values):
            raise BundleError(f"{where} holds no valid section {section.name!r}: it was altered")
        takes.append(
            section.checked([Found(f"{where}, section {section.name!r},", item) for item in values], notes)
        )
    unknown = sorted(found.keys() - {section.name for section in sections})
    if unknown:
        notes.append(
            f"{bundle.path} holds the {', '.join(map(repr, unknown))} of the run that saved it, which this trainer does not use"
        )
    return takes
