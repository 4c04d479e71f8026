"""Greedy ids of our fp32 engine beside transformers' on SmolLM2-135M: 20 prompts of 8 to 64 tokens, 64 new ids for each.

Ours continue each prompt alone, and all of them in one padded batch. Writes results/same_ids.json; fails where an id differs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode_models
from benchmarks.contestant import versions
from benchmarks.decode import HERE, PACKAGES, process_of
from bmgraph.ir.pass_record import machine

PROMPTS, NEW = 20, 64
LENGTHS = (8, 16, 24, 32, 40, 48, 56, 64)


def differences(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> dict[int, int]:
    """The prompts whose ids differ, with the place of the first one that does."""
    return {
        row: next(place for place, (one, other) in enumerate(zip(mine, theirs)) if one != other)
        for row, (mine, theirs) in enumerate(zip(expected, found))
        if list(mine) != list(theirs)
    }


def main() -> None:
    """Compare, and write what was found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, default=decode_models.assets.CACHE / "decode")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "same_ids.json")
    options = parser.parse_args()
    _, rows = decode_models.texts(options.work)
    prompts = [
        row[: LENGTHS[index % len(LENGTHS)]]
        for index, row in enumerate(rows[decode_models.CALIBRATION :][:PROMPTS])
    ]
    ids: dict[str, Any] = {}
    known = decode_models.contestants(options.work, 2)
    for name in ("transformers fp32", "bmgraph fp32"):
        kind, make = known[name]
        worker = process_of(kind, make(rows), False)
        ids[name] = [worker.ask(prompts=[prompt], new=NEW)["ids"][0] for prompt in prompts]
        if kind == "bmgraph":
            ids["in one batch"] = worker.ask(prompts=prompts, new=NEW)["ids"]
        worker.close()
    expected = ids.pop("transformers fp32")
    found = {name: differences(expected, mine) for name, mine in ids.items()}
    results = {
        "machine": machine(),
        "versions": versions(PACKAGES),
        "prompts": PROMPTS,
        "new": NEW,
        "prompts that differ, and where first": found,
    }
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(found)
    assert not any(found.values()), found


if __name__ == "__main__":
    main()
