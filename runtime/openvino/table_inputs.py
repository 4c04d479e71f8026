"""Tables of deltas that an OpenVINO engine owns: inputs of its models that no caller gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.owned_tables import narrowed


class TableInputs:
    """The tables that a model reads, by the name of its input; `names` maps it to that of the table in `tensors`.

    The model reads the memory of the tensors, so that what is written there is what it computes with. `choice` is the input that
    chooses among their entries, where one choice may stand for all rows; else "".
    """

    def __init__(
        self, names: Mapping[str, str], tensors: Mapping[str, torch.Tensor], choice: str = ""
    ) -> None:
        self.names = dict(names)
        self.arrays: dict[str, Array] = {name: tensors[table].numpy() for name, table in names.items()}
        self._choice = choice

    def narrowed(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The feeds, with one choice in the place of equal ones."""
        return narrowed(self._choice, feeds)
