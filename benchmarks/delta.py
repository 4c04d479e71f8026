"""Deltas beside PEFT, few-shot: MiniLM on TREC-6 and SMS spam, SmolLM2 on Rotten Tomatoes.

Accuracy, trained share, seconds and memory of each method over seeds, and whether the interval of the paired differences to
PEFT, where it has the method, holds 0. Each side is a process of one thread (`delta_arms.py`), which take turns step by step on
the same batches, from the same first values. One task and number of shots takes at most 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contestant import Contestant
from benchmarks.delta_arms import METHODS
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
TASKS: dict[str, dict[str, Any]] = {
    "trec": {
        "methods": ("head", "lora", "ia3", "adapter", "bitfit", "full"),
        "steps": 40,
        "size": 16,
        "tested": 500,
    },
    "sms": {
        "methods": ("head", "lora", "ia3", "adapter", "bitfit", "full"),
        "steps": 30,
        "size": 16,
        "tested": 500,
    },
    "movies": {"methods": ("lora", "soft", "adapter"), "steps": 12, "size": 8, "tested": 120},
}
ALONE = ("adapter", "bitfit")
"""Methods that PEFT does not have."""

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Student's t for 95% by the number of seeds."""


def arm(side: str, task: str, tested: int) -> Contestant:
    """One side's process."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return Contestant("benchmarks.delta_arms", side, task, str(tested), environment=threads)


def run(
    arms: dict[str, Contestant], method: str, shots: int, seed: int, steps: int, size: int
) -> dict[str, Any]:
    """Train and test one method by both sides in turn, or by ours alone."""
    sides = ["ours"] if method in ALONE else ["ours", "theirs"]
    found: dict[str, Any] = {}
    with TemporaryDirectory() as start:
        for side in sides:
            found[side] = arms[side].ask(
                do="build", method=method, shots=shots, seed=seed, size=size, start=start
            )
    done: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for step in range(steps):
        for side in sides if step % 2 == 0 else sides[::-1]:
            done[side].append(arms[side].ask(do="step"))
    for side in sides:
        later = done[side][2:]  # the first ones fill caches
        found[side] |= {
            "step_s": statistics.median(one["s"] for one in later),
            "step_cpu_s": statistics.median(one["cpu_s"] for one in later),
            "losses": [one["loss"] for one in done[side]],
            **arms[side].ask(do="test"),
        }
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of each side, and the paired interval of accuracies."""
    found: dict[str, Any] = {}
    for side in runs[0]:
        keys = (
            "accuracy",
            "trained",
            "share",
            "step_s",
            "step_cpu_s",
            "build_cpu_s",
            "built_mb",
            "steps_peak_mb",
        )
        found[side] = {
            key: statistics.fmean(one[side][key] for one in runs) for key in keys if key in runs[0][side]
        }
        found[side]["accuracies"] = [one[side]["accuracy"] for one in runs]
    found["seeds"] = len(runs)
    if "theirs" in found:
        ours, theirs = found["ours"], found["theirs"]
        gains = [one - other for one, other in zip(ours["accuracies"], theirs["accuracies"])]
        mean = statistics.fmean(gains)
        half = (
            T_95[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) in T_95 else None
        )
        found["accuracy_gain"] = {"mean": mean, "half_interval_95": half}
        found["equal_or_better"] = None if half is None else mean + half >= 0
        found["losses_apart"] = max(
            abs(one - other)
            for run in runs
            for one, other in zip(run["ours"]["losses"], run["theirs"]["losses"])
        )
        for key in ("step_s", "step_cpu_s", "steps_peak_mb"):
            found[f"{key}_over_theirs"] = ours[key] / theirs[key]
    return found


def measure(options: argparse.Namespace, methods: tuple[str, ...]) -> None:
    """All methods of a task with one number of shots; seeds outermost, so that a busy minute hits all methods. What is there is
    written after each run."""
    begin, task, size = time.perf_counter(), options.task, TASKS[options.task]["size"]
    steps, tested = (getattr(options, name) or TASKS[task][name] for name in ("steps", "tested"))
    arms = {side: arm(side, task, tested) for side in ("ours", "theirs")}
    found: dict[str, Any] = {
        "shots": options.shots,
        "steps": steps,
        "batch": size,
        "tested": tested,
        "note": options.note,
    }
    if task == "movies":
        ours, theirs = arms["ours"].ask(do="zero"), arms["theirs"].ask(do="zero")
        found["zero_shot"] = {
            "accuracy": ours["accuracy"], "by_hand": theirs["accuracy"], "same_classes": ours["classes"] == theirs["classes"],
            "cpu_s": ours["cpu_s"], "by_hand_cpu_s": theirs["cpu_s"],
        }  # fmt: skip
        found["calibrated"] = {"accuracy": ours["calibrated"]}
        print(found["zero_shot"], found["calibrated"], flush=True)
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for seed in range(options.seeds):
        for method in methods:
            done = run(arms, method, options.shots, seed, steps, size)
            runs[method].append(done)
            figures = ", ".join(
                f"{side} {one['accuracy']:.3f} in {one['step_cpu_s']:.2f} CPU s a step, {one['steps_peak_mb']:.0f} MB"
                for side, one in done.items()
            )
            print(f"{task} {options.shots} a class, seed {seed}, {method}: {figures}", flush=True)
            found["methods"] = {name: summary(done) for name, done in runs.items() if done}
            write(task, {**found, "seconds": time.perf_counter() - begin})
    for one in arms.values():
        one.close()


def write(task: str, found: dict[str, Any]) -> None:
    """Put the results of a task and number of shots into results/delta.json, beside those of other methods there."""
    path = HERE / "results" / "delta.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    key = f"{task} {found['shots']}"
    packages = {name: version(name) for name in ("bmgraph", "torch", "transformers", "peft")}
    methods = {**results.get(key, {}).get("methods", {}), **found["methods"]}
    results[key] = {
        **found,
        "methods": methods,
        "machine": {**machine(), "threads": "1"},
        "versions": packages,
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--shots", type=int, default=16, help="rows of each class to train on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="by default those of the task")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tested", type=int)
    parser.add_argument("--note", default="", help="what was special about the machine")
    options = parser.parse_args()
    measure(options, tuple(options.methods or TASKS[options.task]["methods"]))


if __name__ == "__main__":
    main()
