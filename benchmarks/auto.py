"""`backend="auto"` beside each installed backend by itself: how much slower its choice is than the best, timed apart.

Writes results/auto.json. On a quiet machine: about five minutes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from benchmarks.contestant import versions
from benchmarks.encoders import ENCODERS
from bmgraph.backends import Auto
from bmgraph.passes import Quantize
from bmgraph.runtime.engine_base import Engine

HERE = Path(__file__).parent
THREADS = 2
BACKENDS = ("onnx", "openvino")
SIZES: dict[str, tuple[int, int, int | None]] = {
    "8x128": (8, 128, None),
    "8x32": (8, 32, None),
    "1x32": (1, 32, None),
}
"""Name of an example -> rows, length, length of the shortest row."""


def measured(name: str, size: tuple[int, int, int | None], int8: bool, runs: int) -> dict[str, Any]:
    """The engine that `auto` takes for an example, and the medians of all in turn on other rows of that size."""
    encoder = ENCODERS[name]()
    program = bg.capture(encoder.model, encoder.batch(0, *size))
    passes = [Quantize("int8")] if int8 else []
    calibration = encoder.calibration() if int8 else None
    engines: dict[str, Engine] = {
        other: bg.compile(program, passes, backend=other, calibration=calibration) for other in BACKENDS
    }
    engines["auto"] = bg.compile(program, passes, backend=Auto(among=BACKENDS), calibration=calibration)
    batch = encoder.batch(600, *size)
    ready = {other: (lambda engine=engine: engine(**batch)) for other, engine in engines.items()}
    found = bg.benchmark(ready, batch, runs=runs, warmup=3)
    print(name, size, "int8" if int8 else "fp32", found, sep="\n", flush=True)
    return {
        **found.as_json(),
        "chosen": engines["auto"].report.backend,
        "the best over auto": max(found.speedup(other, over="auto") for other in BACKENDS),
    }


def main() -> None:
    """Measure MiniLM at all sizes, in float and in int8."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="timed rounds of each example")
    parser.add_argument("--only", nargs="*", choices=list(ENCODERS), default=["minilm"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "auto.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    results: dict[str, Any] = {
        f"{name}, {size}, {'int8' if int8 else 'fp32'}": measured(name, SIZES[size], int8, options.runs)
        for name in options.only
        for size in SIZES
        for int8 in (False, True)
    }
    versions_of = versions(("bmgraph", "torch", "onnxruntime-gpu", "openvino"))
    options.out.write_text(
        json.dumps({"results": results, "versions": versions_of, "threads": THREADS}, indent=1) + "\n"
    )
    for name, row in results.items():
        print(f"| {name} | {row['chosen']} | {row['the best over auto']:.2f} |")


if __name__ == "__main__":
    main()
