"""Looks up sizes in the configuration files of a folder, whichever part of the configuration holds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bmgraph.serialize.weight_files import read_json

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that say how images and sounds are prepared; the first that is there counts."""


class ConfigFields:
    """Fields of a nested configuration by name; the outermost one of a name is taken.

    A model of several parts (text and image, encoder and decoder) has a configuration in its configuration for each part.
    """

    def __init__(self, tree: Mapping[str, Any]) -> None:
        self._tree = tree

    def get(self, *names: str) -> Any:
        """The first of the fields `names` that is there and not null, level by level; None without one."""
        level: list[Mapping[str, Any]] = [self._tree]
        while level:
            for name in names:
                for part in level:
                    if part.get(name) is not None:
                        return part[name]
            level = [item for part in level for item in part.values() if isinstance(item, Mapping)]
        return None

    def number(self, *names: str, otherwise: int = 0) -> int:
        """The first of the fields that is a whole number; `otherwise` without one."""
        for name in names:
            found = self.get(name)
            if isinstance(found, int) and not isinstance(found, bool):
                return found
        return otherwise


def processor_fields(folder: Path) -> ConfigFields:
    """What a folder says of the preparation of images and sounds; empty if it says nothing. Raises InputError."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file():
            return ConfigFields(read_json(folder / name))
    return ConfigFields({})
