"""What `resume=` costs, and what it saves: SmolLM2-135M to 4 bits by GPTQ, plain, with a folder, and killed in the middle.

Each run is a process of its own; CPU seconds are those of the passes alone. The killed one gets SIGKILL once half of the layers are kept.

    python -m benchmarks.resume                # three rounds of plain and kept in turn, then the killed one: about 15 minutes on a quiet core
    python -m benchmarks.resume --rounds 1 --layers 6     # a model of the first layers alone: a minute
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bmgraph as bg
from benchmarks.smollm2 import WINDOW, reordered, text
from bmgraph.ir.pass_record import machine
from bmgraph.passes import Quantize
from bmgraph.utils.digest import weights_digest

FILE = Path(__file__).parent / "results" / "resume.json"
WINDOWS = 24


def run(folder: str, layers: int) -> dict[str, Any]:
    """One run of the passes, in this process."""
    torch.set_num_threads(1)
    model, tokenizer = reordered()
    if layers:
        model.model.layers = model.model.layers[:layers]
    ids = torch.tensor(tokenizer(text("train"))["input_ids"][: WINDOW * WINDOWS]).reshape(WINDOWS, 1, WINDOW)
    program = bg.capture(model, {"input_ids": ids[0]})
    batches = [{"input_ids": window} for window in ids]
    print("ready", flush=True)
    begin, wall = time.process_time(), time.perf_counter()
    passes = [Quantize("int4", method="gptq", group=128, embeddings=8)]
    done = bg.Pipeline(passes).run(program, calibration=batches, max_drift=1.0, resume=folder or None)
    return {
        "cpu_seconds": time.process_time() - begin,
        "seconds": time.perf_counter() - wall,
        "weights": weights_digest(done.tensors()),
        "new_bytes": sum(item.nbytes for item in done.tensors().values()),
    }


def started(folder: str, layers: int) -> subprocess.Popen[str]:
    """A process with one run, which is at its passes."""
    command = [sys.executable, "-m", "benchmarks.resume", "--run", folder, "--layers", str(layers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while (line := process.stdout.readline()) and line != "ready\n":
        pass
    return process


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run printed."""
    out, _ = process.communicate()
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def killed(folder: Path, layers: int) -> float:
    """Kill a run once half of its layers are kept; the seconds that its passes ran."""
    process, begin = started(str(folder), layers), time.perf_counter()
    while len(list(folder.glob("kept-*"))) < (layers or 30) // 2:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return time.perf_counter() - begin


def main() -> None:
    """Print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=0, help="of the model; 0 for all")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(run(options.run, options.layers)))
        return
    figures: dict[str, Any] = {"machine": machine(), "layers": options.layers or 30, "plain": [], "kept": []}
    with tempfile.TemporaryDirectory() as place:
        for _ in range(options.rounds):
            for name in ("plain", "kept"):
                folder = "" if name == "plain" else str(Path(place) / "kept")
                figures[name].append(finished(started(folder, options.layers)))
                print(name, figures[name][-1], flush=True)
                options.out.write_text(json.dumps(figures, indent=1) + "\n")
        folder = Path(place) / "killed"
        lost = killed(folder, options.layers)
        size = sum(item.stat().st_size for item in folder.iterdir())
        figures["killed"] = {
            "seconds": lost,
            "bytes_kept": size,
            "then": finished(started(str(folder), options.layers)),
        }
    plain, kept = (
        statistics.median(item["cpu_seconds"] for item in figures[name]) for name in ("plain", "kept")
    )
    figures["cost"] = kept / plain - 1
    figures["left_after_the_kill"] = figures["killed"]["then"]["cpu_seconds"] / plain
    everything = [*figures["plain"], *figures["kept"], figures["killed"]["then"]]
    figures["bit_equal"] = len({item["weights"] for item in everything}) == 1
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(
        json.dumps(
            {key: figures[key] for key in ("cost", "left_after_the_kill", "killed", "bit_equal")}, indent=1
        )
    )


if __name__ == "__main__":
    main()
