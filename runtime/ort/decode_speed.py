"""Measures how fast an engine generates, and how much of the memory's bandwidth that takes."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from bmgraph.errors import BackendError
from bmgraph.runtime.generation.decode_loop import Speed
from bmgraph.runtime.generation.speculation import unable
from bmgraph.runtime.ort.weights_read import weights_read

if TYPE_CHECKING:
    from rich.table import Table

    from bmgraph.runtime.openvino.engine import OpenVinoEngine
    from bmgraph.runtime.ort.engine import OrtEngine

READ_BYTES = 2**28
"""What is summed up to measure the bandwidth of reading: more than caches hold."""

PROMPT, NEW = 64, 64
"""Tokens of the prompt and new tokens of a measurement, as far as the model has positions for them."""


@dataclass(frozen=True)
class DecodeSpeed:
    """Medians of tokens per second of one row, the bytes that a new token reads (weights and cache), and the bytes per second that this
    machine reads; tokens per second and per step with `speculate=True`, 0 for an engine that does not speculate."""

    prompt_tokens: int
    new_tokens: int
    prefill: float
    decode: float
    bytes_per_token: int
    bandwidth: float
    speculating: float = 0.0
    per_step: float = 0.0

    @property
    def share(self) -> float:
        """The part of the bandwidth that decoding takes."""
        return self.decode * self.bytes_per_token / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        """The figures."""
        return {**asdict(self), "share_of_bandwidth": self.share}

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(
            title=f"generation, 1 x {self.prompt_tokens} + {self.new_tokens} tokens", title_justify="left"
        )
        for name in (
            "prefill tokens/s",
            "decode tokens/s",
            "MB read per token",
            "read bandwidth GB/s",
            "share",
            *(("speculating", "tokens per step") if self.speculating else ()),
        ):
            table.add_column(name, justify="right")
        table.add_row(
            f"{self.prefill:.0f}", f"{self.decode:.0f}", f"{self.bytes_per_token / 1e6:.1f}", f"{self.bandwidth / 1e9:.1f}",
            f"{self.share:.0%}", *((f"{self.speculating:.0f}", f"{self.per_step:.2f}") if self.speculating else ()),
        )  # fmt: skip
        return table


def decode_speed(engine: OrtEngine | OpenVinoEngine, runs: int = 5) -> DecodeSpeed | None:
    """Time the generation of one row greedily, `runs` times after one that does not count; None for an engine that cannot generate, or
    that takes inputs whose values only its user knows.

    The ids of the prompt are drawn anew for each run; speculation is timed on the same.
    """
    decoder = engine.decoder()
    if decoder is None or any(not spec.names for spec in decoder.cache.others):
        return None
    cache = decoder.cache
    start = 0 if decoder.encoder_inputs and engine.generation.start is None else None
    limit = cache.limit or PROMPT + NEW
    prompt = min(PROMPT, max(1, limit // 2))
    new = min(NEW, limit - prompt)
    tokenizer, engine.tokenizer = engine.tokenizer, None
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(cache.vocabulary, (runs + 1, prompt), generator=generator).tolist()
    try:
        found = _speeds(engine, prompts, new, start, False)
        try:
            ahead = [] if unable(decoder) else _speeds(engine, prompts, new, start, True)
        except BackendError:  # its tokens move each other
            ahead = []
    finally:
        engine.tokenizer = tokenizer
    held = prompt + new // 2
    size = weights_read(engine.files)
    size += sum(slot.past.dtype.itemsize * _product(slot.past.shape[1:], held) for slot in cache.slots)
    return DecodeSpeed(
        prompt, new, statistics.median(item.prefill for item in found[1:]), statistics.median(item.decode for item in found[1:]),
        size, read_bandwidth(engine.threads), *_medians(ahead[1:]),
    )  # fmt: skip


def _speeds(
    engine: OrtEngine | OpenVinoEngine, prompts: list[list[int]], new: int, start: int | None, speculate: bool
) -> list[Speed]:
    """The speed of each generation."""
    found = []
    for ids in prompts:
        engine.generate(ids, max_new_tokens=new, eos=(), start=start, speculate=speculate)
        found.append(engine.speed)
    return found


def _medians(speeds: list[Speed]) -> tuple[float, float]:
    """Tokens per second and per step; zeros of none."""
    if not speeds:
        return 0.0, 0.0
    return statistics.median(item.decode for item in speeds), statistics.median(
        item.per_step for item in speeds
    )


def _product(dims: tuple[int | str, ...], positions: int) -> int:
    count = 1
    for dim in dims:
        count *= dim if isinstance(dim, int) else positions
    return count


def read_bandwidth(threads: int | None = None, runs: int = 5) -> float:
    """Bytes per second that sums over a large array read: the best of a few."""
    values = torch.ones(READ_BYTES // 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        seconds = []
        for _ in range(runs):
            begin = time.perf_counter()
            values.sum()
            seconds.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return READ_BYTES / min(seconds)
