"""Attack bmgraph as a hostile user would, and write how each attack ended.

Usage: python benchmarks/attacks_loading.py [--short] [--seed N] [--out attacks.json]

Loading: re-signed mutations of programs and engines, resource bombs, and kills of savers. Each attack is seeded; one that was
neither refused nor harmless, or took more than 30 s or 2x its size + 200 MB, is named, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bmgraph as bg
from tests.helpers.attacks.loading import Outcome, Watched, bombs, kill_savers, mutated
from tests.helpers.bundles import toy

FULL = {"mutations": 1000, "bombs": 60, "kills": 200}
SHORT = {"mutations": 100, "bombs": 12, "kills": 5}


def originals(folder: Path) -> list[Path]:
    """A program and an engine to attack."""
    toy().save(folder / "program")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 2))
    bg.compile(model, example=(torch.randn(3, 64),), backend="onnx").save(folder / "engine")
    return [folder / "program", folder / "engine"]


def summed(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """How many attacks were tried and held, how they ended, and the worst time and memory."""
    found = list(outcomes)
    return {
        "tried": len(found),
        "held": sum(item.held for item in found),
        "ends": dict(Counter(item.end for item in found)),
        "most_seconds": round(max((item.seconds for item in found), default=0.0), 2),
        "most_megabytes": round(max((item.grown for item in found), default=0) / 2**20),
        "broken": [f"{item.attack}: {item.end} {item.told}" for item in found if not item.held],
    }


def attack_loading(counts: dict[str, int], seed: int, folder: Path) -> dict[str, Any]:
    """Every attack on loading."""
    saved = originals(folder)
    watched = Watched(saved)
    try:
        table = {
            "re-signed mutations": summed(
                watched.load(name, path)
                for name, path in mutated(saved, folder / "mutations", counts["mutations"], seed)
            ),
            "resource bombs": summed(
                watched.load(name, path)
                for name, path in bombs(saved[0], saved[1], folder / "bombs", counts["bombs"], seed)
            ),
        }
    finally:
        watched.close()
    (folder / "kills").mkdir()
    wrong = list(kill_savers(folder / "kills" / "bundle", counts["kills"], seed))
    table["kills in saves"] = {
        "tried": len(wrong),
        "held": wrong.count(""),
        "broken": [text for text in wrong if text],
    }
    return table


def main() -> int:
    """Run the attacks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a tenth of the attacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the table, as JSON")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bmgraph-attacks-") as folder:
        table = attack_loading(SHORT if options.short else FULL, options.seed, Path(folder))
    for name, row in table.items():
        print(f"{name}: {row['held']} of {row['tried']} held", *row["broken"], sep="\n  ")
    if options.out:
        result = {"seed": options.seed, "seconds": round(time.monotonic() - began), "loading": table}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["broken"] for row in table.values()))


if __name__ == "__main__":
    sys.exit(main())
