"""Requests that run together beside one after the other: `engine.submit` with 8 rows, and `engine.generate`.

`smollm2`: SmolLM2-135M in int8 on OpenVINO, whose cache is the state of a request. `t5`: an encoder-decoder of T5-small's size with weights
at random, in fp32 on ONNX Runtime. Prompts have 20 to 80 tokens and answers 32 to 96; both take turns, on one thread. Writes
results/batching.json: tokens per second, medians, and their ratio by wall clock and by the processor's time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from benchmarks.contestant import versions
from bmgraph.backends import Onnx, OpenVINO
from bmgraph.ir.pass_record import machine
from bmgraph.passes import Quantize
from bmgraph.runtime import Batching

HERE = Path(__file__).parent
ROWS = 8


def smollm2() -> Any:
    """SmolLM2 on OpenVINO."""
    from benchmarks import smollm2 as model

    ids = torch.randint(5, 40000, (2, 12))
    return bg.compile(
        model.loaded()[0], [Quantize("int8", activations="none")], example={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        backend=OpenVINO(generate=True, threads=1), max_drift=0.2,
    )  # fmt: skip


def t5() -> Any:
    """A model of T5-small's size on ONNX Runtime."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    )
    ids = torch.randint(5, 30000, (2, 12))
    return bg.compile(
        T5ForConditionalGeneration(config).eval(),
        example={"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :6]},
        backend=Onnx(generate=True, threads=1),
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {"smollm2": smollm2, "t5": t5}


def asked(engine: Any, count: int) -> list[dict[str, Any]]:
    """Requests of mixed lengths."""
    draw, ids = random.Random(0), engine.decoder().cache.vocabulary
    return [
        {"prompt": [draw.randrange(ids) for _ in range(draw.randint(20, 80))], "max_new_tokens": draw.randint(32, 96), "eos": ()}
        for _ in range(count)
    ]  # fmt: skip


def alone(engine: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    """The ids of each, one after the other."""
    return [
        engine.generate(**{"prompts" if key == "prompt" else key: item[key] for key in item})
        for item in requests
    ]


def together(engine: Any, requests: list[dict[str, Any]]) -> list[list[int]]:
    """The ids of each, all at once; nothing is kept of an earlier round."""
    engine.stop_batching()
    engine.batching = Batching(rows=ROWS, prefix_bytes=0)
    return [list(item.result().ids) for item in [engine.submit(**item) for item in requests]]


def measured(engine: Any, rounds: int, count: int) -> dict[str, Any]:
    """Tokens per second of both, and ratios."""
    requests, spent, found = asked(engine, count), [], []
    tokens = sum(item["max_new_tokens"] for item in requests)
    for _ in range(rounds + 1):
        times = []
        for run in (alone, together):
            begin, used = time.perf_counter(), time.process_time()
            found.append(run(engine, requests))
            times.append((time.perf_counter() - begin, time.process_time() - used))
        spent.append(times)
    engine.stop_batching()
    spent = spent[1:]  # the first round warms up
    return {
        "alone_tokens_s": statistics.median(tokens / one[0] for one, _ in spent),
        "together_tokens_s": statistics.median(tokens / other[0] for _, other in spent),
        "ratio": statistics.median(one[0] / other[0] for one, other in spent),
        "ratio_cpu": statistics.median(one[1] / other[1] for one, other in spent),
        "unequal": sum(one != other for one, other in zip(*found[:2])),
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "batching.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "machine": machine(), "versions": versions(("bmgraph", "torch", "onnxruntime", "openvino")), "rounds": options.rounds,
        "requests": options.requests, "rows": ROWS, "load": os.getloadavg(), "results": {},
    }  # fmt: skip
    for name in options.models.split(","):
        found["results"][name] = measured(MODELS[name](), options.rounds, options.requests)
        print(
            f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in found['results'][name].items())}",
            flush=True,
        )
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
