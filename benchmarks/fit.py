"""MiniLM within budgets of bytes: what `Fit` takes of int8, int4, mixed codes and shrinking, and the curve of all that it tried.

Each budget is a search of its own for ONNX Runtime, calibrated on SMS; then the chosen passes are compiled by name, and the engine is compared
with eager on texts that calibration has not seen: the bytes must be those of the plan. Results are written after each budget.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from benchmarks.encoders import Encoder, minilm
from bmgraph.ir.pass_record import machine
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.passes import Fit, known_passes
from bmgraph.passes.fit.plan import FitPlan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "fit.json"

BUDGETS = ("90MB", "45MB", "25MB", "15MB")
OVER = (
    "shrink{ffn=0.25}",
    "quantize{scheme=int8,embeddings=null|8}",
    "quantize{scheme=int4,group=32,embeddings=8|4,method=mse}",
    "quantize{scheme=mixed,average=5,group=32,embeddings=4}",
)
ROWS, LENGTH, CALIBRATION = 4, 64, 4
UNSEEN = 16
"""Batches on which the engine is compared with eager."""


def searched(program: Program, budget: str, batches: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The plan of a budget, its seconds, and the chosen passes; empty where nothing fits."""
    wall, spent = time.perf_counter(), time.process_time()
    plan = bg.plan(program, [Fit(bytes=budget, over=OVER)], backend="onnx", calibration=batches)
    assert isinstance(plan, FitPlan)
    print(plan, flush=True)
    return {
        "budget": budget, "chosen": plan.passes, "fits": plan.chosen is not None, "plan": plan.as_json(),
        "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - spent,
    }  # fmt: skip


def compiled(encoder: Encoder, program: Program, found: dict[str, Any], batches: Any) -> dict[str, Any]:
    """The engine of the chosen passes, beside what the plan said of it."""
    passes = parse_passes(found["chosen"], known_passes())
    engine = bg.compile(program, passes, backend="onnx", calibration=batches)
    cosines = []
    for number in range(UNSEEN):
        batch = encoder.batch(5000 + 32 * number, ROWS, LENGTH, 24)
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            expected = encoder.model(**batch).last_hidden_state[real]
        given = engine(**batch)["last_hidden_state"][real]
        cosines.append(float(torch.nn.functional.cosine_similarity(given, expected, -1).mean()))
    planned = found["plan"]["chosen"]
    return {
        "bytes": engine.report.bytes, "planned_bytes": planned["files"], "cosine_unseen": sum(cosines) / UNSEEN,
        "planned_cosine": planned["cosine"], "planned_drift": planned["drift"],
        "ms_before": engine.report.milliseconds_before, "ms": engine.report.milliseconds, "timed": engine.report.timed,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=BUDGETS, help="budgets")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    encoder = minilm()
    encoder.longest = LENGTH
    batches = [encoder.batch(2000 + 64 * number, ROWS, LENGTH, 24) for number in range(CALIBRATION)]
    program = bg.capture(encoder.model, batches[0])
    rows = json.loads(given.out.read_text())["budgets"] if given.out.exists() else {}
    for budget in given.only:
        found = searched(program, budget, batches)
        if found["fits"]:
            found["engine"] = compiled(encoder, program, found, batches)
        rows[budget] = found
        text = {"machine": machine(), "over": OVER, "rows": ROWS, "length": LENGTH, "budgets": rows}
        given.out.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    for budget, found in rows.items():
        engine = found.get("engine")
        print(
            budget,
            found["chosen"] or "nothing fits",
            engine and {k: engine[k] for k in ("bytes", "cosine_unseen")},
        )


if __name__ == "__main__":
    main()
