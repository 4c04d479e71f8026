"""MiniLM on a torch engine, as it is and by `Torch(torch_compile=True)`, beside `torch.compile` of the model itself and ONNX Runtime.

`torch.compile` of the model runs by its defaults and with Inductor's `freezing`, which packs weights too, for one form of all sizes. All have
the threads that the process has, in float32. Writes results/compiled.json, in about four minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from benchmarks.contestant import versions
from benchmarks.encoders import ENCODERS, Batch
from bmgraph.backends import Torch
from bmgraph.ir.pass_record import machine
from bmgraph.utils.torch_internals import packing_weights
from bmgraph.verify.metrics import relative_error

HERE = Path(__file__).parent
THREADS = 2
SIZES: dict[str, tuple[int, int, int | None]] = {
    "8x128": (8, 128, None),
    "8x128, lengths 64 to 128": (8, 128, 64),
    "1x128": (1, 128, None),
    "8x32": (8, 32, None),
    "1x32": (1, 32, None),
}
"""Name of a measurement -> rows, length, length of the shortest row."""

EAGER = "eager"


def contestants(model: torch.nn.Module, batch: Batch) -> dict[str, Callable[[Batch], torch.Tensor]]:
    """Every way to run the model, as a function from batch to last hidden state."""
    program = bg.capture(model, batch)
    engines: dict[str, Any] = {
        "bmgraph on torch": bg.compile(program, [], backend="torch"),
        "bmgraph on torch, torch_compile": bg.compile(program, [], backend=Torch(torch_compile=True)),
        "bmgraph on onnxruntime": bg.compile(program, [], backend="onnx"),
    }
    calls: dict[str, Any] = {EAGER: model, "torch.compile": torch.compile(model, dynamic=True)} | engines
    return {
        name: (lambda batch, call=call: call(**batch)["last_hidden_state"]) for name, call in calls.items()
    } | {"torch.compile, freezing": frozen(model)}


def frozen(model: torch.nn.Module) -> Callable[[Batch], torch.Tensor]:
    """torch.compile of a copy of the model with its weights packed, which a global setting asks for."""
    call = torch.compile(copy.deepcopy(model), dynamic=True)

    def run(batch: Batch) -> torch.Tensor:
        with packing_weights():
            return call(**batch)["last_hidden_state"]  # type: ignore[no-any-return]

    return run


def main() -> None:
    """Measure all sizes in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=25, help="timed rounds of each size")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compiled.json")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    encoder = ENCODERS["minilm"]()
    results: dict[str, Any] = {}
    with torch.no_grad():
        calls = contestants(encoder.model, encoder.batch(0, 4, 64, None))
        for size, (rows, length, shortest) in SIZES.items():
            batch = encoder.batch(300, rows, length, shortest)
            ready = {name: (lambda call=call, batch=batch: call(batch)) for name, call in calls.items()}
            expected = ready[EAGER]()
            apart = {name: relative_error(call(), expected) for name, call in ready.items()}
            found = bg.benchmark(ready, batch, runs=options.runs, warmup=3)
            print(size, found, sep="\n", flush=True)
            results[size] = {**found.as_json(), "relative error": apart}
            content = {
                "results": results,
                "machine": machine(),
                "versions": versions(("bmgraph", "torch", "transformers", "onnxruntime-gpu")),
                "threads": THREADS,
            }
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
