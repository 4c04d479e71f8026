"""Train a delta for each of two tasks on two ranks, then serve both in one batch with one int8 engine.

python -m examples.two_tasks
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.passes import Deltas, Quantize
from bmgraph.utils.progress import track
from examples.two_tasks.model import language_model
from examples.two_tasks.tasks import task

NAMES = ("trec", "sms")


def main() -> None:
    """Train the deltas that do not exist yet, then serve and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/two_tasks"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--held-out", type=int, default=200)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if not (options.out / name).is_dir():
            train(name, options.out, options.ranks, options.steps)
    figures = serve(options.out, options.held_out)
    (options.out / "figures.json").write_text(json.dumps(figures, indent=1))
    for name in NAMES:
        print(
            f"{name}: accuracy {figures[name]['delta']:.3f} with its delta, {figures[name]['zero_shot']:.3f} zero-shot; "
            f"trained in {figures[name]['train_seconds']:.0f} s on {options.ranks} ranks"
        )


def train(name: str, out: Path, ranks: int, steps: int) -> None:
    """Train one delta with torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["-m", "examples.two_tasks.train", name, f"--steps={steps}", f"--out={out / name}"]
    subprocess.run(command, check=True)


def serve(out: Path, held_out: int) -> dict[str, Any]:
    """Serve both tasks with one engine: every batch has rows of both, each with its own delta."""
    source = language_model()
    example = {name: value for name, value in source.example.items() if name != "labels"}
    engine = bg.compile(
        source.model,
        passes=[Quantize("int8", activations="none"), Deltas(NAMES)],
        example=example,
        backend=Onnx(generate=True),
        resources={**{name: out / name for name in NAMES}, "tokenizer": source.tokenizer},
    )
    print(engine.report)
    tasks = {name: task(name) for name in NAMES}
    found: dict[str, Any] = {}
    begin = time.perf_counter()
    right, right_untrained = dict.fromkeys(NAMES, 0), dict.fromkeys(NAMES, 0)
    for start in track(range(0, held_out, 4), "answering"):
        rows = [(job, *item) for job in tasks.values() for item in job.held_out(held_out)[start : start + 4]]
        answers = engine.generate(
            [job.ask(text) for job, text, _ in rows], max_new_tokens=3, delta=[job.name for job, *_ in rows]
        )
        untrained = engine.generate(
            [job.ask_untrained(text) for job, text, _ in rows], max_new_tokens=8, delta=[None] * len(rows)
        )
        for (job, _, word), answer, other in zip(rows, answers, untrained):
            right[job.name] += job.read(answer) == word
            right_untrained[job.name] += job.read(other) == word
    for name in NAMES:
        training = json.loads((out / f"{name}.json").read_text())
        found[name] = {
            "delta": right[name] / held_out,
            "zero_shot": right_untrained[name] / held_out,
            "train_seconds": training["seconds"],
        }
    found["serving_seconds"] = time.perf_counter() - begin
    found["engine_megabytes"] = engine.report.bytes / 1e6
    found["threads"] = torch.get_num_threads()
    return found


if __name__ == "__main__":
    main()
