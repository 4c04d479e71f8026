"""Memory of a rank against ranks 1 to 4 and stages of ZeRO: predicted, and measured. `python -m benchmarks.memory_plan`.

Measured are live bytes of storages by a dispatch mode of the tests, on gloo ranks. Writes results/memory_plan.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.passes import Offload, Remat, ZeRO
from tests.helpers.live_bytes import measured_peak
from tests.helpers.ranks import run_ranks
from tests.passes.test_remat import captured, rows

RESULT = Path(__file__).parent / "results" / "memory_plan.json"
ROWS = 240
WAYS: dict[str, tuple[StepPass, ...]] = {
    **{f"ZeRO({stage})": (ZeRO(stage),) for stage in range(4)},
    "Remat('layers'), ZeRO(3)": (Remat("layers"), ZeRO(3)),
    "ZeRO(3), Offload('optimizer')": (ZeRO(3), Offload("optimizer")),
}


def rank_bytes(rank: int) -> dict[str, list[int]]:
    """Predicted and measured peak of a rank for each way to train."""
    found = {}
    for way, passes in WAYS.items():
        program = captured(0.0).clone()
        program.example = rows(ROWS)
        backend = Torch(optimizer=AdamW(lr=1e-3), clip_norm=1.0)
        trainer = bg.compile(program, passes=passes, backend=backend, verify="off")
        found[way] = [trainer.plan.peak.total, measured_peak(trainer, program.example)]
    return found


def main() -> None:
    """Run on 1 to 4 ranks, print a table and write it."""
    found: list[dict[str, object]] = []
    for ranks in (1, 2, 3, 4):
        told = run_ranks(ranks, rank_bytes)[0]
        for way, (planned, measured) in told.items():
            found.append({"passes": way, "ranks": ranks, "predicted": planned, "measured": measured,
                          "error": round(planned / measured - 1, 4)})  # fmt: skip
            print(
                f"{way:<32}{ranks:>3}{planned:>12,}{measured:>12,}{planned / measured - 1:>8.1%}", flush=True
            )
    told_of = f"4 toy layers of 16 and 64, {ROWS} rows over all ranks; bytes of rank 0 at its peak"
    RESULT.write_text(json.dumps({"what": told_of, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
