"""SmolLM2-135M on OpenVINO with its KV cache in floats and in codes of 8 bits: memory, tokens per second at 1,024 positions, perplexity.

Writes results/kv_cache.json. Both engines are of one program and take turns. `python -m benchmarks.kv_cache --rounds 5 --threads 2`
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bmgraph as bg
from benchmarks import smollm2
from benchmarks.contestant import versions
from bmgraph.backends import OpenVINO
from bmgraph.ir.pass_record import machine
from bmgraph.passes import KVCache
from bmgraph.runtime.openvino.engine import OpenVinoEngine

HERE = Path(__file__).parent
POSITIONS, PIECE, NEW, ROWS = 1024, 64, 24, 8
"""Positions that are read, in pieces of so many; tokens of a timed run; rows whose memory is measured."""


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def feeds(ids: np.ndarray[Any, Any], begin: int, end: int, scored: list[int]) -> dict[str, Any]:
    """What reads positions `begin` to `end` of ids [B, S]."""
    return {
        "input_ids": np.ascontiguousarray(ids[:, begin:end]),
        "attention_mask": np.ones((len(ids), end), np.int64),
        "scored_positions": np.array(scored, np.int64),
    }


def read(engine: OpenVinoEngine, request: Any, ids: np.ndarray[Any, Any]) -> float:
    """Read ids piece by piece into an empty cache; returns the negative log likelihood of the second half, per token."""
    model, losses = engine.models.stateful(), []
    for begin in range(0, POSITIONS, PIECE):
        late = begin >= POSITIONS // 2
        scored = list(range(PIECE)) if late and len(ids) == 1 else [PIECE - 1]
        logits = torch.from_numpy(model.step(request, feeds(ids, begin, begin + PIECE, scored)))
        if late and len(ids) == 1:
            following = torch.from_numpy(ids[:, begin + 1 : begin + PIECE + 1])
            scores = logits[0, : following.shape[1]].log_softmax(-1)
            losses += (-scores.gather(1, following[0][:, None])[:, 0]).tolist()
    return statistics.mean(losses) if losses else math.nan


def decoded(engine: OpenVinoEngine, request: Any, ids: np.ndarray[Any, Any], at: int) -> float:
    """Tokens per second of single steps behind `at` positions."""
    model = engine.models.stateful()
    given = [feeds(ids, at + i, at + i + 1, [0]) for i in range(NEW)]
    begin = time.perf_counter()
    for item in given:
        model.step(request, item)
    return NEW / (time.perf_counter() - begin)


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = smollm2.loaded()
    ids = tokenizer(smollm2.text("test", 30_000), return_tensors="np")["input_ids"].astype(np.int64)
    example = {
        "input_ids": torch.from_numpy(ids[:, :48]).reshape(2, 24),
        "attention_mask": torch.ones(2, 24).long(),
    }
    program = bg.Pipeline([KVCache()]).run(bg.capture(model, example))
    engines = {
        kind: bg.compile(program, backend=OpenVINO(threads=options.threads, precision="f32", kv_cache=kind))
        for kind in ("float", "int8")
    }
    found: dict[str, dict[str, Any]] = {kind: {} for kind in engines}
    window = ids[:, : POSITIONS + 1]
    for kind, engine in engines.items():
        found[kind]["notes"] = engine.report.notes
        found[kind]["engine_drift"] = engine.report.engine_drift
        found[kind]["perplexity"] = math.exp(read(engine, engine.models.stateful().request(), window))
    print(json.dumps(found, indent=1), flush=True)
    speeds: dict[str, list[float]] = {kind: [] for kind in engines}
    requests = {kind: engine.models.stateful().request() for kind, engine in engines.items()}
    for kind, engine in engines.items():
        read(engine, requests[kind], window)
    for turn in range(options.rounds):
        for kind, engine in engines.items():
            speeds[kind].append(decoded(engine, requests[kind], ids, POSITIONS + turn * NEW))
    ratios = [rounded / whole for whole, rounded in zip(speeds["float"], speeds["int8"])]
    for kind, values in speeds.items():
        found[kind]["tokens_per_s"] = statistics.median(values)
    print({kind: item["tokens_per_s"] for kind, item in found.items()}, statistics.median(ratios), flush=True)
    del requests
    many = np.repeat(window[:, :POSITIONS], ROWS, 0)
    for kind, engine in engines.items():
        read(engine, engine.models.stateful().request(), many[:1])
        gc.collect()
        before = resident()
        request = engine.models.stateful().request()
        read(engine, request, many)
        found[kind]["cache_bytes_per_position"] = (resident() - before) / (ROWS * POSITIONS)
        del request
    figures = {
        "machine": machine(), "versions": versions(("bmgraph", "torch", "openvino")), "threads": options.threads,
        "rounds": options.rounds, "positions": POSITIONS, "rows_of_memory": ROWS,
        "int8_of_float_tokens_per_s": statistics.median(ratios), "engines": found,
    }  # fmt: skip
    (HERE / "results" / "kv_cache.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
