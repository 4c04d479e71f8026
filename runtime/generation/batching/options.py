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
    prefill: how many tokens of prompts are read between two steps of the requests that run, which wait for them. prefix_bytes: what of
    `cache_bytes` keeps texts that were read, for prompts that begin with the same; None for a quarter, 0 for none.

    wide: let steps of many tokens, over all rows, multiply weights in 4 bits as 8-bit integers, on ONNX Runtime's CPU, where the memory
    for these weights is at hand, and where a text shows that it is faster and about as near to what the weights say as the kernel of few
    rows (`runtime/ort/wide_form.py`). Rows do not depend on each other, but ids may differ where two are nearly as likely.

    Raises InputError for numbers below 1.

    Example:
        >>> Batching(rows=8, waiting=100).rows
        8
    """

    rows: int = 32
    waiting: int = 256
    cache_bytes: int | None = None
    prefill: int = 256
    prefix_bytes: int | None = None
    wide: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "waiting", "cache_bytes", "prefill", "prefix_bytes"):
            value = getattr(self, name)
            if value is None and name in ("cache_bytes", "prefix_bytes"):
                continue
            lowest = int(name != "prefix_bytes")
            if whole_number(name, value) < lowest:
                raise InputError(f"{name}={shown(value)}: give a whole number of {lowest} or more")
        if self.cache_bytes is not None and (self.prefix_bytes or 0) >= self.cache_bytes:
            raise InputError(
                f"prefix_bytes={self.prefix_bytes} is all that cache_bytes={self.cache_bytes} allows: leave memory to the rows that run"
            )

    def positions(self, bytes_of_position: int) -> tuple[int, int]:
        """How many positions the rows that run may hold, and how many may be kept of texts that were read."""
        given = memory_budget() if self.cache_bytes is None else self.cache_bytes
        kept = given // 4 if self.prefix_bytes is None else min(self.prefix_bytes, given)
        return (given - kept) // bytes_of_position, kept // bytes_of_position
