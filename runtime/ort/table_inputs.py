"""Inputs of the sessions of an ONNX Runtime engine that no caller gives: tables of deltas that it owns, and where rows of a cache end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.session import import_onnxruntime
from bmgraph.runtime.owned_tables import narrowed

if TYPE_CHECKING:
    from onnxruntime import OrtValue


class TableInputs:
    """The tables that one session reads, by the name of its input; `names` maps it to that of the table in `tensors`.

    On the CPU a session reads the memory of the tensors, so that what is written there is what it computes with. On another device
    it reads copies, which `written` makes anew. `choice` is the input that chooses among their entries, where one choice may stand
    for all rows; else "". `ends`: see `CacheSpec`; rows then end at the last position, unless a step says otherwise.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        tensors: Mapping[str, torch.Tensor],
        device: str,
        choice: str = "",
        ends: str | None = None,
    ) -> None:
        self.names = dict(names)
        self._choice = choice
        self._arrays = {name: tensors[table].numpy() for name, table in names.items()}
        kind = import_onnxruntime().OrtValue
        self.values: dict[str, OrtValue] = {
            name: kind.ortvalue_from_numpy(array, device) for name, array in self._arrays.items()
        }
        self._copied = [
            name for name, value in self.values.items() if value.data_ptr() != self._arrays[name].ctypes.data
        ]
        if ends is not None:
            self.values[ends] = kind.ortvalue_from_numpy(np.full(1, -1, np.int32), device)

    def bind(self, binding: Any) -> None:
        """Bind the tables to a run."""
        for name, value in self.values.items():
            binding.bind_ortvalue_input(name, value)

    def narrowed(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """The feeds, with one choice in the place of equal ones: its delta is then gathered once, and multiplied as one matrix."""
        return narrowed(self._choice, feeds)

    def written(self) -> None:
        """Let the session read what was written into the tensors."""
        for name in self._copied:
            self.values[name].update_inplace(self._arrays[name])
