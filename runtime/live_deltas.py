"""engine.deltas: the deltas among which rows choose, added, removed and swapped while the engine runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.deltas.row_tables import RowTables
from bmgraph.errors import InputError
from bmgraph.ir.categorical_input import check_indices, indices_of
from bmgraph.ir.given_tensor import as_tensor
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.runtime.delta_slots import Hold, Names, Slots

if TYPE_CHECKING:
    from bmgraph.runtime.engine_base import Engine


class LiveDeltas:
    """The deltas that rows of an engine choose by name, in tables that the engine owns.

    `add`, `remove` and `swap` write one entry of the tables: nothing is compiled or built again. A call reads the deltas that its
    names had when it began. Iterate for the names.

    `engine.deltas.add("sports", "adapters/sports")`, then `engine(**batch, delta=["sports", None])`.
    """

    def __init__(
        self,
        form: RowTables,
        tensors: Mapping[str, torch.Tensor],
        engines: Sequence[Engine],
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.form = form
        """What the tables take."""
        self.tensors = dict(tensors)
        """The tables by name, [capacity + 1, ...]."""
        self.changed = False
        """Whether deltas were added, removed or swapped since the engine was built."""
        self._engines, self._written = tuple(engines), written
        self._slots = Slots(form.names)
        self._rename()

    @property
    def capacity(self) -> int:
        """How many deltas the tables have room for."""
        return len(self.form.names)

    @property
    def bytes(self) -> int:
        """The memory of the tables, whether entries are taken or not."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @property
    def slots(self) -> Names:
        """The names of the entries 1, 2, ... now, "" for a free one."""
        return self._slots.names

    def add(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load a delta that `save_delta` or PEFT wrote into a free entry, under a new name.

        Raises BundleError for a folder that is not valid, MisplacedError for a delta of another backbone, PassError for one that
        the tables have no room for, InputError where the name is taken or there is no free entry.
        """
        self._put(name, folder, instead=False)

    def swap(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Load another delta under a name that is there: calls that began before read the old one, whole.

        Raises what `add` raises, and InputError for an unknown name.
        """
        self._put(name, folder, instead=True)

    def remove(self, name: str) -> None:
        """Free the entry of a delta; calls that began before go on with it. Raises InputError for an unknown name."""
        self._slots.drop(name)
        self.changed = True
        self._rename()

    def taken(self) -> dict[str, torch.Tensor]:
        """Copies of the tables, in which entries that are free change nothing: what was removed is not saved."""
        kept = [0, *(number if name else 0 for number, name in enumerate(self.slots, 1))]
        return {name: table[kept] for name, table in self.tensors.items()}

    def numbers(self, names: Sequence[str | None]) -> list[int]:
        """The entries of names now, 0 for None: what rows choose by number; raises InputError for an unknown name."""
        slots = self.slots
        for name in names:
            if name is not None and (not name or name not in slots):
                known = ", ".join(filter(None, slots)) or "none"
                raise InputError(f"no delta is called {name!r} (there are {known})")
        return [0 if name is None else slots.index(name) + 1 for name in names]

    def hold(self, value: object, spec: TensorSpec, sizes: Mapping[str, int]) -> Hold:
        """Hold the entries that a call chooses, by names, numbers, or None, as in `indices_of`; raises InputError."""

        def numbers(names: Names) -> list[int]:
            named = replace(spec, names=names)
            given: Any = indices_of(named, value, sizes)
            tensor = as_tensor(f"input {spec.name!r}", given, str(named))
            if tensor.dtype != spec.dtype or tensor.dim() != 1:
                return []  # the check of all inputs tells
            check_indices(named, tensor)
            found: list[int] = tensor.tolist()
            free = [number for number in found if number and not names[number - 1]]
            if free:
                raise InputError(f"input {spec.name!r} holds {free[0]}, which no delta has: {named}")
            return found

        return self._slots.hold(numbers)

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self.slots if name])

    def __len__(self) -> int:
        return sum(map(bool, self.slots))

    def __contains__(self, name: object) -> bool:
        return bool(name) and name in self.slots

    def __repr__(self) -> str:
        each = self.bytes / (self.capacity + 1)
        return (
            f"<{len(self)} of {self.capacity} deltas: {', '.join(self) or 'none'}; tables of {self.bytes / 1e6:.1f} MB, {each / 1e6:.1f} MB "
            "a delta>"
        )

    def _put(self, name: str, folder: str | os.PathLike[str], instead: bool) -> None:
        from bmgraph.deltas.peft_format import (
            read_adapter,  # late: a process that swaps nothing reads no folders
        )
        from bmgraph.deltas.row_entries import entry_of, write_entry

        if not isinstance(name, str) or not name:
            raise InputError(f"a delta is called {name!r}: give a text that is not empty")
        entry = entry_of(self.form, read_adapter(Path(folder)), self.tensors)

        def write(number: int) -> None:
            write_entry(self.tensors, number, entry)
            self._written()

        self._slots.put(name, write, instead)
        self.changed = True
        self._rename()

    def _rename(self) -> None:
        """Let the inputs of the engines say which names they take."""
        names = self.slots
        for engine in self._engines:
            engine.rename_choice(self.form.input, names)
