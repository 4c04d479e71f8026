"""A small language model (SmolLM2-135M) on bmgraph's engines beside transformers, onnxruntime-genai and llama.cpp: speed, memory, perplexity.

Run in the environment that `make peers` builds. Each contestant has a process of its own; all take turns, each round with other prompts.
Writes results/decode.json and the table in README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import decode_models
from benchmarks.contestant import Contestant, versions
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
THREADS, LENGTH, NEW, PAUSE = 2, 64, 64, 0.1
PASSAGE = 24
"""Ids of a passage that a repetitive prompt repeats."""
PACKAGES = (
    "bmgraph",
    "torch",
    "transformers",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "llama-cpp-python",
)
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Lets malloc of every contestant ask for huge pages."""


def process_of(kind: str, source: Path, huge_pages: bool) -> Contestant:
    """A contestant's process."""
    environment = {"OMP_NUM_THREADS": str(THREADS), **(HUGE_PAGES if huge_pages else {})}
    return Contestant(
        "benchmarks.decode_workers", kind, str(source), "--threads", str(THREADS), environment=environment
    )


def started(
    folder: Path, names: Sequence[str], rows: list[list[int]], huge_pages: bool
) -> dict[str, Contestant]:
    """The contestants that can be had here; of the others it is said why not."""
    found = {}
    for name, (kind, make) in decode_models.contestants(folder, THREADS).items():
        if names and name not in names:
            continue
        try:
            found[name] = process_of(kind, make(rows), huge_pages)
        except Exception as error:  # a peer that is not installed, or a pass that is not there
            print(f"without {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return found


def race(
    workers: Mapping[str, Contestant], rows: list[list[int]], batch: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of prefill and decode in each round, whose prompts are the same for all and new, and tokens per step of
    those that speculate."""
    generator = random.Random(batch)
    speed: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in workers}
    order = list(workers)
    for turn in range(rounds + 1):
        prompts = [row[:LENGTH] for row in generator.sample(rows, batch)]
        for name in order:
            time.sleep(PAUSE)
            found = workers[name].ask(prompts=prompts, new=NEW)
            assert all(len(ids) == NEW for ids in found["ids"]), name
            if turn:
                speed[name]["prefill"].append(batch * LENGTH / found["prefill_s"])
                speed[name]["decode"].append(batch * (NEW - 1) / found["decode_s"])
                if "per_step" in found:
                    speed[name].setdefault("per_step", []).append(found["per_step"])
        order = order[1:] + order[:1]
    return speed


def summary(speed: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """Medians, and for each contestant the medians of its ratios to every other one, round by round."""
    return {
        name: {
            part: {
                "median": statistics.median(runs),
                "over": {
                    other: statistics.median(mine / theirs for mine, theirs in zip(runs, speed[other][part]))
                    for other in speed
                    if part in speed[other]
                },
            }
            for part, runs in parts.items()
        }
        for name, parts in speed.items()
    }


def repetitive(rows: list[list[int]]) -> list[list[int]]:
    """Prompts that repeat their first passage."""
    return [(row[:PASSAGE] * LENGTH)[:LENGTH] for row in rows]


def quality(workers: Mapping[str, Contestant], windows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Perplexity on the windows; the peak of memory so far, before it, in MiB."""
    found = {}
    for name, worker in workers.items():
        peak = worker.ask(prompts=[windows[0][:LENGTH]], new=1)["peak_mib"]
        scored = worker.ask(score=windows)
        found[name] = {"perplexity": math.exp(scored["nll"] / scored["count"]), "peak_mib": peak}
    return found


def table(results: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    sizes = list(results["speed"])
    head = " | ".join(f"{part}, {size}" for size in sizes for part in ("decode", "prefill"))
    lines = [f"| tokens/s | {head} | perplexity | peak MiB |", "|---" * (2 * len(sizes) + 3) + "|"]
    for name, found in results["quality"].items():
        cells = [
            f"{results['speed'][size][name][part]['median']:.0f}"
            for size in sizes
            for part in ("decode", "prefill")
        ]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {found['perplexity']:.1f} | {found['peak_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all contestants and write the results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[], help="the names of contestants")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--huge-pages", action="store_true", help="for all contestants")
    parser.add_argument(
        "--work", type=Path, default=decode_models.assets.CACHE / "decode", help="where models are kept"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "decode.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    windows, rows = decode_models.texts(options.work)
    calibration, prompts = rows[: decode_models.CALIBRATION], rows[decode_models.CALIBRATION :]
    workers = started(options.work, options.only, calibration, options.huge_pages)
    results: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(PACKAGES),
        "threads": THREADS,
        "huge_pages": options.huge_pages,
    }
    results["speed"] = {}
    for batch in options.batches:
        for text, given in (("", prompts), (", repetitive", repetitive(prompts))):
            speed = race(workers, given, batch, options.rounds)
            results["speed"][f"{batch} x {LENGTH} + {NEW}{text}"] = summary(speed)
    results["quality"] = quality(workers, windows)
    for worker in workers.values():
        worker.close()
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
