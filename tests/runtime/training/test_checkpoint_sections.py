"""Sections of a checkpoint: saved, checked before anything changes, and told where nobody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bmgraph.errors import BundleError, InputError
from bmgraph.runtime.training.checkpoint_sections import Found, Section, Take
from bmgraph.serialize.bundle import MANIFEST
from tests.helpers.bundles import edit_json
from tests.runtime.training.test_checkpoint import built


class Position(Section):
    """A position in the data, of each rank if `per_rank`."""

    name = "position"

    def __init__(self, item: Any = 0) -> None:
        self.item = item

    def saved(self) -> dict[str, Any]:
        return {"item": self.item, "rate": 1}

    def checked(self, found: Sequence[Found], notes: list[str]) -> Take:
        items = [one.get("item", int, least=0) for one in found]
        assert all(isinstance(one.get("rate", float), float) for one in found)
        if not items:
            notes.append("the data begins anew")

        def take() -> None:
            self.item = items[0] if items else 0

        return take


class EachPosition(Position):
    """The same, of each rank."""

    per_rank = True


@pytest.mark.parametrize("kind", [Position, pytest.param(EachPosition, marks=pytest.mark.slow)])
def test_a_section_comes_back(tmp_path: Path, kind: type[Position]) -> None:
    first, second = built(), built()
    first.sections.append(kind(7))
    first.save(tmp_path / "some")
    section = kind()
    second.sections.append(section)
    second.load(tmp_path / "some")
    assert section.item == 7
    with pytest.warns(UserWarning, match="holds the 'position' of the run that saved it"):
        built().load(tmp_path / "some")


def test_what_is_not_valid_is_refused_before_anything_changes(tmp_path: Path) -> None:
    trainer, section = built(), Position(3)
    trainer.save(tmp_path / "without")
    trainer.sections.append(section)
    trainer.save(tmp_path / "some")
    for value, message in (
        ({"item": "4", "rate": 1}, r"section 'position', holds item='4', expected int"),
        ({"item": -4, "rate": 1}, "expected 0 or more"),
        ({"item": True, "rate": 1}, "expected int"),
        ({"item": 4}, "rate=None, expected float"),
        ([4], "no valid section 'position'"),
    ):
        edit_json(
            tmp_path / "some" / MANIFEST, lambda manifest, v=value: manifest["sections"].update(position=v)
        )
        with pytest.raises(BundleError, match=message):
            trainer.load(tmp_path / "some")
        assert section.item == 3
    with pytest.warns(UserWarning, match="the data begins anew"):
        trainer.load(tmp_path / "without")
    section.item = {3}
    with pytest.raises(InputError, match="'position' cannot be saved in a checkpoint as JSON"):
        trainer.save(tmp_path / "other")
