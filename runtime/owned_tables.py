"""Tables of deltas that an engine owns, which its models take as inputs that no caller gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bmgraph.deltas.row_tables import RowTables
from bmgraph.runtime.generation.sampling import Array


@dataclass(frozen=True)
class OwnedTables:
    """Tables of deltas that an engine owns: what they take, and the tensors by name."""

    form: RowTables
    tensors: Mapping[str, torch.Tensor]

    @property
    def choice(self) -> str:
        """The input that chooses among their entries, where one choice may stand for all rows; else ""."""
        return self.form.input if self.form.broadcasts else ""


def narrowed(choice: str, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
    """The feeds, with one choice in the place of equal ones: its delta is then gathered once, and multiplied as one matrix."""
    chosen = feeds.get(choice)
    if chosen is None or len(chosen) < 2 or not bool((chosen == chosen[0]).all()):
        return feeds
    return {**feeds, choice: chosen[:1]}
