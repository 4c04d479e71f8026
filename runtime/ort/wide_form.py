"""A second form of a decoder's model, for steps of many positions, whose products are those of `wide_products`: taken where it is seen to
be faster, and about as close to what codes and scales say as the first form is.

What channels hold is read from a text that the model writes itself, so nobody need give one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bmgraph.ir.cache_spec import CacheSpec
from bmgraph.runtime.generation.decode_loop import step_feeds
from bmgraph.runtime.generation.row_values import no_values
from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.ort.model_files import ModelFiles
from bmgraph.runtime.ort.providers import CPU
from bmgraph.runtime.ort.session import ModelInMemory, import_onnxruntime, make_session
from bmgraph.runtime.ort.wide_products import (
    bytes_of_wide_form,
    exact_form,
    rounded_values,
    write_wide_form,
)
from bmgraph.runtime.temporary import folder_for_engine
from bmgraph.utils.memory_budget import memory_budget

if TYPE_CHECKING:
    from onnx import TensorProto
    from onnxruntime import InferenceSession

    from bmgraph.runtime.ort.decoder import OrtDecoder

TEXT, LONGEST = 128, 3.0
"""The ids of the text that the model writes, and the seconds that it may take; what is missing then is drawn evenly."""

SIZES = (64, 32, 16, 8, 4, 2)
"""Numbers of positions of a step at which both forms are timed, from the largest on."""

RUNS, ENOUGH = 3, 1.0
"""Runs of each form at each number, of which the fastest counts; no more than one once all took so many seconds."""

AS_NEAR, NEAR = 2.0, 0.01
"""The next ids may diverge from those of products that round no activations by so many times what those of the first form do, and so
many nats; kernels whose sums saturate are much further off."""

SHARE = 3
"""So many times the weights of the second form must fit in what weights may take of the memory."""


@dataclass(frozen=True)
class WideForm:
    """A second session of a model, for steps of `least` positions or more over all rows.

    bytes: of its weights. divergence: the mean Kullback-Leibler divergence in nats of what follows each position of a text from what
    codes and scales say; divergence_before: that of the first session.
    """

    session: InferenceSession
    least: int
    bytes: int
    divergence: float
    divergence_before: float

    def __str__(self) -> str:
        return (
            f"steps of {self.least} positions or more multiply 8-bit integers ({self.bytes / 1e6:.0f} MB more memory; their ids diverge by "
            f"{self.divergence:.4f} nats from products that round nothing, those of smaller steps by {self.divergence_before:.4f})"
        )


def wide_form(files: ModelFiles, threads: int | None, decoder: OrtDecoder) -> WideForm | None:
    """The second form of a decoder of this model; None where its products have none, memory is short, or it is no gain."""
    import onnx

    if decoder.cache.memories or not decoder.on_cpu:
        return None
    model = onnx.ModelProto.FromString(files.read(weights=False).data)
    values, size = rounded_values(model), bytes_of_wide_form(model)
    if not values or SHARE * size > memory_budget():
        return None
    read = files.read()
    feeds = _feeds(decoder, _written(decoder))
    logits = decoder.cache.logits.name
    expected, *seen = make_session(
        ModelInMemory(read.path, exact_form(model).SerializeToString(), read.weights), [CPU], threads
    ).run([logits, *values], feeds)
    with folder_for_engine() as folder:
        try:
            file = folder.path / "wide.onnx"
            write_wide_form(model, lambda item: _bytes(item, read), dict(zip(values, seen)), file)
            found, size = make_session(file, [CPU], threads), Path(f"{file}.data").stat().st_size
        finally:
            folder.delete()  # what ONNX Runtime mapped stays until it lets go of it
    before, after = (
        _divergence(expected[0], session.run([logits], feeds, _giving_back())[0][0])
        for session in (decoder.session, found)
    )
    if not after <= AS_NEAR * before + NEAR:
        return None
    least = _least(decoder, found)
    return None if least is None else WideForm(found, least, size, after, before)


def _giving_back() -> Any:
    """Options of a run after which a session gives memory back: no later run has as many logits."""
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _least(decoder: OrtDecoder, wide: InferenceSession) -> int | None:
    """The least of SIZES from which on the second session is faster; None where it is not at the largest."""
    draw, least, begin = np.random.default_rng(0), None, time.perf_counter()
    limit = decoder.cache.limit
    for size in SIZES:
        if limit is not None and size > limit:
            continue
        feeds = _feeds(decoder, draw.integers(0, decoder.cache.vocabulary, size).tolist(), scored=1)
        seconds = [float("inf"), float("inf")]
        for number in range(RUNS):
            if number and time.perf_counter() - begin > ENOUGH:
                break
            for place, session in enumerate((decoder.session, wide)):
                start = time.perf_counter()
                session.run([decoder.cache.logits.name], feeds)
                seconds[place] = min(seconds[place], time.perf_counter() - start)
        if seconds[1] >= seconds[0]:
            break
        least = size
    return least


def _written(decoder: OrtDecoder) -> list[int]:
    """Ids that the model draws one after the other."""
    cache, draw, begin = decoder.cache, np.random.default_rng(0), time.perf_counter()
    count = TEXT if cache.limit is None else min(TEXT, cache.limit)
    ids = [int(draw.integers(0, cache.vocabulary))]
    state = decoder.start(1, {}, count)
    while len(ids) < count and time.perf_counter() - begin < LONGEST:
        tokens, mask = np.array([ids[-1:]], np.int64), np.ones((1, len(ids)), np.int64)
        logits = state.step(step_feeds(cache, tokens, mask, no_values(cache.others, 1), [0]))[0]
        known = logits[: cache.vocabulary]
        ids.append(int((known + draw.gumbel(size=len(known))).argmax()))
    return [*ids, *draw.integers(0, cache.vocabulary, count - len(ids)).tolist()]


def _feeds(decoder: OrtDecoder, ids: list[int], scored: int | None = None) -> dict[str, Any]:
    """The inputs of a run of one row without cached positions, of which the last `scored`, or all, have logits."""
    cache: CacheSpec = decoder.cache
    tokens = np.array([ids], np.int64)
    last = range(len(ids) - (scored or len(ids)), len(ids))
    steps = step_feeds(cache, tokens, np.ones_like(tokens), no_values(cache.others, 1), last)
    empty = {name: value.numpy() for name, value in cache.empty(1).items()}
    return {**steps, **empty, **decoder.tables.values}


def _bytes(item: TensorProto, read: ModelInMemory) -> bytes:
    """What a weight stores, in the model or in the file beside it."""
    from onnx import TensorProto, numpy_helper

    if item.data_location != TensorProto.EXTERNAL:
        return item.raw_data or numpy_helper.to_array(item).tobytes()
    entries = {entry.key: entry.value for entry in item.external_data}
    begin = int(entries.get("offset", 0))
    held = memoryview(read.weights[Path(entries["location"]).name])
    return bytes(held[begin : begin + int(entries["length"])])


def _divergence(expected: Array, given: Array) -> float:
    """The mean Kullback-Leibler divergence of what follows each position, in nats; infinite where numbers are not finite."""
    first, second = (_log_probabilities(item.astype(np.float64)) for item in (expected, given))
    found = float((np.exp(first) * (first - second)).sum(-1).mean())
    return found if np.isfinite(found) else float("inf")


def _log_probabilities(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found
