"""How an engine batches continuously: how many rows run together, how many requests wait, what memory the cache may take."""

from __future__ import annotations

from dataclasses import dataclass

from bmgraph.errors import InputError
from bmgraph.runtime.generation.option_checks import shown, whole_number
from bmgraph.utils.memory_budget import memory_budget


@dataclass(frozen=True)
class Batching:
    """Limits of continuous batching; set `engine.batching` before the first `submit`.

    rows: how many requests run together at most. waiting: how many more may wait for a place; beyond them `submit` raises BusyError.
    cache_bytes: what the KV cache of all of them may take, None for half of the memory that is free when the engine begins to batch.
    prefill: how many tokens of prompts are read between two steps of the requests that run, which wait for them.

    Raises InputError for numbers below 1.

    Example:
        >>> Batching(rows=8, waiting=100).rows
        8
    """

    rows: int = 32
    waiting: int = 256
    cache_bytes: int | None = None
    prefill: int = 128

    def __post_init__(self) -> None:
        for name in ("rows", "waiting", "cache_bytes", "prefill"):
            value = getattr(self, name)
            if value is None and name == "cache_bytes":
                continue
            if whole_number(name, value) < 1:
                raise InputError(f"{name}={shown(value)}: give a whole number of 1 or more")

    def positions(self, bytes_of_position: int) -> int:
        """How many positions of rows the cache may hold."""
        given = memory_budget() if self.cache_bytes is None else self.cache_bytes
        return given // bytes_of_position
