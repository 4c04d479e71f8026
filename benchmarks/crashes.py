"""Crashes of one rank while it trains and saves beside training: killed 20 times, stopped, raising; and resumption elsewhere.

Writes results/crashes.json: seconds until all other ranks had ended, what they said, whether what followed was equal to a run
that nothing disturbed, bit by bit. `python -m benchmarks.crashes` (`--kills 3` for a short one).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bmgraph.ir.pass_record import machine
from tests.helpers.attacks.crashes import Crash, Plan, raising, random_kills, stopped, whole

HERE = Path(__file__).parent
LIMIT = 30.0
"""Seconds in which the others must have ended, after the timeout where one applies."""
TIMEOUT = 6.0
CLOSE = 1e-5
MOVES = ((2, 3, 4), (3, 3, 8), (1, 1, 12), (2, 2, 16))
"""Ranks, stage and last step of runs, each of which goes on from the one before."""


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A chain of runs, each ended by a kill; in the end one that is not, compared with one that nothing disturbed."""
    plan = Plan(folder / "killed")
    crashes = random_kills(plan, count, seed, LIMIT)
    steps = max(step for crash in crashes for step in crash.losses) + 2
    last = whole(Plan(folder / "killed", steps=steps))
    expected = whole(Plan(folder / "whole", steps=steps))
    found = [*(crash.losses for crash in crashes), last]
    wrong = sorted({step for losses in found for step, loss in losses.items() if loss != expected[step]})
    return {
        "kills": count,
        "while saving": sum(crash.while_saving for crash in crashes),
        "slowest": round(max(crash.seconds for crash in crashes), 2),
        "reasons": reasons(crashes),
        "steps": steps,
        "steps that differ": wrong,
    }


def reasons(crashes: Iterable[Crash]) -> list[str]:
    """What the others said, each once."""
    return sorted({reason for crash in crashes for reason in crash.reasons})


def moves(folder: Path) -> dict[str, Any]:
    """Resumption on other numbers of ranks and other stages, against one run."""
    expected = whole(Plan(folder / "one", steps=MOVES[-1][2]))
    worst = 0.0
    for ranks, stage, steps in MOVES:
        losses = whole(Plan(folder / "moved", ranks, stage, steps))
        worst = max([worst, *(abs(loss - expected[step]) / expected[step] for step, loss in losses.items())])
    return {"ranks, stage, last step": MOVES, "largest difference of a loss": worst, "bound": CLOSE}


def main() -> None:
    """Run all, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "crashes.json")
    given = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {"machine": machine(), "seed": given.seed, "timeout": TIMEOUT}
        results["killed"] = kills(folder, given.kills, given.seed)
        print(results["killed"], flush=True)
        for ranks in (2, 3):
            plan = Plan(folder / f"stopped {ranks}", ranks, steps=4000, timeout=TIMEOUT)
            others, itself = stopped(plan, ranks - 1, 5, TIMEOUT + LIMIT)
            results[f"stopped, {ranks} ranks"] = {
                "seconds": round(others.seconds, 2),
                "reasons": reasons([others]),
                "the stopped one, once it goes on": [round(itself.seconds, 2), *itself.reasons],
            }
            print(results[f"stopped, {ranks} ranks"], flush=True)
        found = raising(Plan(folder / "raises", 3, raises_at=5), LIMIT)
        results["raising, 3 ranks"] = {"seconds": round(found.seconds, 2), "reasons": reasons([found])}
        results["moved"] = moves(folder)
    results["seconds"] = round(time.perf_counter() - begin)
    given.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
