"""The parts of a KV cache of one batch, with room behind what they hold, so that a step appends without copying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from bmgraph.ir.cache_spec import Slot

LEAST_ROOM = 64
"""Positions that a cache has room for at least, when it is given room."""


class HeldCache(Mapping[str, torch.Tensor]):
    """What the parts of a cache hold, by the names of the inputs that take them: views of memory that has room for more.

    A part that is set brings memory of its own; it is copied before anything is written behind it.

    Example:
        >>> import torch
        >>> from bmgraph.ir.cache_spec import Slot
        >>> from bmgraph.ir.tensor_spec import TensorSpec
        >>> spec = TensorSpec("past", torch.float32, ("batch", "past", 2))
        >>> cache = HeldCache([Slot(spec, spec, 1)], {"past": torch.zeros(1, 3, 2)})
        >>> cache.with_room(1)["past"][:, -1] = 5.0
        >>> cache.hold(1)
        >>> cache.count, cache["past"][0, :, 0].tolist()
        (4, [0.0, 0.0, 0.0, 5.0])
    """

    def __init__(self, slots: Sequence[Slot], parts: Mapping[str, torch.Tensor]) -> None:
        self._axes = {slot.past.name: slot.axis for slot in slots}
        self._held = dict(parts)
        self._memory: dict[str, torch.Tensor] = {}
        """Of which the parts are the first positions; a part that is not here has no room."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._held[name]

    def __setitem__(self, name: str, part: torch.Tensor) -> None:
        self._held[name] = part
        self._memory.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def count(self) -> int:
        """How many positions it holds."""
        name, axis = next(iter(self._axes.items()))
        return self._held[name].shape[axis]

    def with_room(self, count: int) -> dict[str, torch.Tensor]:
        """The parts with `count` more positions, whose values are what they happen to be."""
        return {name: self._longer(name, count) for name in self._axes}

    def hold(self, count: int) -> None:
        """Take the next `count` positions, which were written, as held."""
        self._held = self.with_room(count)

    def move_into(self, memory: Mapping[str, torch.Tensor]) -> None:
        """Let it go on in other memory, which has room for what it holds, and maybe for more rows."""
        for name, axis in self._axes.items():
            held = self._held[name]
            rows = memory[name][: held.shape[0]]
            part = rows.narrow(axis, 0, held.shape[axis])
            part.copy_(held)
            self._held[name], self._memory[name] = part, rows

    def is_in(self, memory: Mapping[str, torch.Tensor]) -> bool:
        """Whether all parts are in that memory."""
        return all(
            name in self._memory and self._memory[name].data_ptr() == memory[name].data_ptr()
            for name in self._axes
        )

    def _longer(self, name: str, count: int) -> torch.Tensor:
        axis, held = self._axes[name], self._held[name]
        needed = held.shape[axis] + count
        memory = self._memory.get(name)
        if memory is None or memory.shape[axis] < needed:
            shape = list(held.shape)
            shape[axis] = needed + max(LEAST_ROOM, needed // 4)
            memory = held.new_empty(shape)
            memory.narrow(axis, 0, held.shape[axis]).copy_(held)
            self._memory[name] = memory
        return memory.narrow(axis, 0, needed)
