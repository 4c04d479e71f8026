"""One feed-forward, dense and MoEfied, on ONNX Runtime: milliseconds for few and many tokens, with rotating inputs.

Writes results/moe.json. The dense and the MoEfied form of a precision run in turn, on different tokens each time: with the
same tokens the same experts would stay in the CPU cache and flatter the ratio. One timing covers many runs, after untimed
ones: the threads of the form that ran before spin for a while and take cores from the form being measured.

`--threads 1 --cpu` counts CPU seconds of one thread instead, which other processes disturb little, and writes moe_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx.backend import Onnx
from bmgraph.ir.pass_record import machine
from bmgraph.passes import MoEfy, Quantize
from bmgraph.runtime.ort.engine import OrtEngine

HERE = Path(__file__).parent
WIDTH, NEURONS, EXPERTS, ACTIVE = 1024, 4096, 16, 4
THREADS = 2
TOKENS = (1, 8, 128)
ROUNDS = 60
INPUTS = 32
"""Number of different inputs, used in turn."""
SECONDS = 0.02
"""Minimum duration of one timing of the dense form, in seconds."""
SEED = 0


@dataclass(frozen=True)
class Form:
    """A kind of feed-forward in one precision."""

    name: str
    gated: bool
    activation: str
    precision: str


FORMS = tuple(
    Form(name, gated, activation, precision)
    for name, gated, activation in (
        ("relu", False, "relu"),
        ("silu gated", True, "silu"),
        ("gelu", False, "gelu"),
    )
    for precision in ("fp32", "int8", "int4")
)

ROUNDING: dict[str, tuple[Quantize, ...]] = {
    "fp32": (),
    "int8": (Quantize("int8", activations="dynamic"),),
    "int4": (Quantize("int4"),),
}
"""Precision -> the passes that give it; both forms get the same ones."""


class FeedForward(nn.Module):
    """down(activation(up x)), or down(activation(gate x) * up x)."""

    def __init__(self, gated: bool, activation: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.gate = nn.Linear(WIDTH, NEURONS) if gated else None
        self.activation = getattr(nn.functional, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [tokens, width] -> [tokens, width]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def engines(form: Form, threads: int = THREADS) -> tuple[OrtEngine, OrtEngine]:
    """The dense engine and the MoEfied one, both in the form's precision."""
    torch.manual_seed(SEED)
    program = bg.capture(FeedForward(form.gated, form.activation), {"x": torch.randn(4, WIDTH)})
    calibration = [{"x": torch.randn(64, WIDTH)} for _ in range(8)]
    rounding = ROUNDING[form.precision]
    options: dict[str, Any] = {
        "backend": Onnx(threads=threads),
        "calibration": calibration,
        "example": program.example,
    }
    dense = bg.compile(program, passes=rounding, **options)
    # The router is not trained: random weights and random tokens have nothing to learn, and it costs the same.
    moefied = bg.compile(program, passes=[MoEfy(EXPERTS, ACTIVE, router="random"), *rounding], **options)
    return dense, moefied


def measure(
    dense: OrtEngine,
    moefied: OrtEngine,
    tokens: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Milliseconds of both engines by a clock, timed in turn."""
    inputs = [torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(INPUTS)]
    feeds = [{"x": item.numpy()} for item in inputs]

    def seconds(engine: OrtEngine, first: int, runs: int) -> float:
        """The mean time of `runs` runs of an engine, starting with input number `first`."""
        begin = clock()
        for step in range(first, first + runs):
            engine.run(feeds[step % INPUTS])
        return (clock() - begin) / runs

    for engine in (dense, moefied):
        seconds(engine, 0, INPUTS)
    runs = math.ceil(SECONDS / min(seconds(dense, 0, INPUTS) for _ in range(3)))
    untimed = math.ceil(runs / 4)
    taken: dict[str, list[float]] = {"dense": [], "moefied": []}
    for count in range(rounds):
        for name, engine in (("dense", dense), ("moefied", moefied)):
            seconds(engine, count * runs, untimed)
            taken[name].append(seconds(engine, count * runs + untimed, runs) * 1e3)
    ratios = [one / other for one, other in zip(taken["dense"], taken["moefied"])]
    return {
        "tokens": tokens,
        "dense_ms": statistics.median(taken["dense"]),
        "moefied_ms": statistics.median(taken["moefied"]),
        "speedup": statistics.median(ratios),
        "speedup_quartiles": statistics.quantiles(ratios, n=4),
        "rounds": rounds,
        "runs_a_timing": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="fraction of the rounds to run")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds instead of those of a clock")
    options = parser.parse_args()
    clock, name = (time.process_time, "moe_cpu.json") if options.cpu else (time.perf_counter, "moe.json")
    rows = []
    for form in FORMS:
        dense, moefied = engines(form, options.threads)
        said = [note for note in moefied.report.notes if note.startswith("experts")]
        for tokens in TOKENS:
            found = measure(dense, moefied, tokens, max(3, int(ROUNDS * options.share)), clock)
            rows.append({**asdict(form), **found, "said": said})
            print(
                f"{form.name:10} {form.precision} {tokens:4} tokens: dense {found['dense_ms']:.3f} ms, "
                f"MoEfied {found['moefied_ms']:.3f} ms, {found['speedup']:.2f}x",
                flush=True,
            )
    shape = {"width": WIDTH, "neurons": NEURONS, "experts": EXPERTS, "active": ACTIVE}
    figures = {"shape": shape, "threads": options.threads, "seed": SEED, "rows": rows, "machine": machine()}
    (HERE / "results" / name).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
