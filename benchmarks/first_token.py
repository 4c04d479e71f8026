"""From the start of `bmgraph generate` to its first token: SmolLM2-135M in int4, on ONNX Runtime.

The command is started again and again, in turn with one that only imports torch, which is the floor under it; its output goes to a pipe.
Writes results/first_token.json: wall-clock and CPU seconds. `--cold` takes the engine's files out of the page cache before each start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import assets, serve
from benchmarks.contestant import versions
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
PROMPT = "Once upon a time"
BOUND = 3.0
"""Seconds to the first token that we promise."""


def first_output(command: list[str]) -> dict[str, float]:
    """Seconds until a command writes its first byte, or ends, and the CPU seconds of all of it."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 1)
    found = time.perf_counter() - begin
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {"first_s": found, "cpu_s": used.ru_utime + used.ru_stime}


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians and extremes."""
    first = [run["first_s"] for run in runs]
    return {
        "first_s": statistics.median(first),
        "least_s": min(first),
        "most_s": max(first),
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--bundle", type=Path, help="another engine, saved with a tokenizer")
    parser.add_argument(
        "--cold", action="store_true", help="drop the engine's files from the page cache before each start"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "first_token.json")
    options = parser.parse_args()
    bundle = options.bundle or serve.served(assets.CACHE / "decode")
    commands = {
        "bmgraph generate": [sys.executable, "-m", "bmgraph", "generate", str(bundle), PROMPT, "--max-new-tokens", "8"],
        "bmgraph generate --help": [sys.executable, "-m", "bmgraph", "generate", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
    }  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for name, command in commands.items():
            if options.cold:
                forget(bundle)
            runs[name].append(first_output(command))
    found: dict[str, Any] = {
        "machine": machine(), "versions": versions(("bmgraph", "torch", "onnxruntime")), "runs": options.runs, "cold": options.cold,
        "bound_s": BOUND, "load": os.getloadavg(), "results": {name: summary(items) for name, items in runs.items()},
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, result in found["results"].items():
        print(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in result.items())}")


if __name__ == "__main__":
    main()
