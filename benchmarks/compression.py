"""Compression of SmolLM2-135M: perplexity on WikiText-2 with weights of few bits, by method and by peer, at equal groups.

Every row has a process of its own, and is left out where its figures are in `results/compression.json` already: a run that is stopped
goes on. All rows score the same tokens on torch, ours by the program behind the passes, peers' by the model with the weights that
their codes stand for; all calibrate with the same windows. The tied head is quantized in every row, the lookup of embeddings stays float with peers.

    python -m benchmarks.compression                      # all rows on 12 x 256 tokens
    python -m benchmarks.compression --only "bmgraph int4 gptq 128" fp32 --windows 157
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contestant import versions
from benchmarks.smollm2 import WINDOW, WINDOWS, perplexity, reordered, text
from bmgraph.ir.pass_record import machine

FILE = Path(__file__).parent / "results" / "compression.json"

GROUPS = ("weights", "pruned", "minilm")
"""Groups of rows: SmolLM2 with few bits, and pruned, by perplexity; MiniLM by the cosine of its embeddings."""

MINUTES = 20
"""How long a run begins rows by default."""


def rows_of(group: str) -> Mapping[str, Any]:
    """The rows of a group, by name."""
    from benchmarks.compression_rows import MINILM, PRUNED, ROWS

    return dict(zip(GROUPS, (ROWS, PRUNED, MINILM)))[group]


def score(group: str, name: str, windows: int) -> dict[str, Any]:
    """One row of SmolLM2, in this process."""
    from benchmarks.compression_rows import Source

    model, tokenizer = reordered()
    begin = time.process_time()
    result = rows_of(group)[name](Source(model, tokenizer, text("train")))
    seconds = time.process_time() - begin
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for site, value in result.weights.items():
            model.get_submodule(site).weight.copy_(value)
    found = perplexity(result.call or (lambda ids: model(input_ids=ids).logits), tokenizer, windows)
    return {
        f"perplexity {windows} x {WINDOW}": found,
        "bits": result.bits,
        "cpu_seconds": seconds,
        **result.told,
    }


def read() -> dict[str, Any]:
    """The figures that are there, by group of rows."""
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {name: content.get(name, {}) for name in GROUPS}


def write(groups: dict[str, Any]) -> None:
    """Write the figures, with the machine and versions."""
    content = {
        **(json.loads(FILE.read_text()) if FILE.exists() else {}),
        "machine": machine(),
        "versions": versions(("torch", "onnxruntime", "onnxruntime-gpu", "torchao")),
        **groups,
    }
    part = FILE.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.rename(FILE)


def score_minilm(name: str) -> dict[str, Any]:
    """One row of MiniLM, in this process."""
    from benchmarks.compression_rows import MINILM, minilm

    return {"cosine": minilm(MINILM[name]), "passes": MINILM[name]}


def main() -> None:
    """Run the rows that are missing, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--group", choices=GROUPS, default=GROUPS[0], help="which rows")
    parser.add_argument("--only", nargs="+", help="rows by name, by default all")
    parser.add_argument(
        "--windows", type=int, default=WINDOWS, help=f"windows of {WINDOW} tokens that are scored"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no row begins later than that")
    parser.add_argument("--row", help="one row, whose figures are printed as JSON")
    given = parser.parse_args()
    if given.row:
        of_minilm = given.group == "minilm"
        scored = score_minilm(given.row) if of_minilm else score(given.group, given.row, given.windows)
        print(json.dumps(scored))
        return
    figure = "cosine" if given.group == "minilm" else f"perplexity {given.windows} x {WINDOW}"
    begin = time.monotonic()
    for name in given.only or rows_of(given.group):
        if figure in read()[given.group].get(name, {}):
            continue
        if time.monotonic() - begin > 60 * given.minutes:
            print("the rest is left for another run")
            break
        command = [sys.executable, "-m", "benchmarks.compression", "--group", given.group, "--row", name]
        done = subprocess.run(
            [*command, "--windows", str(given.windows)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(name, "failed:", done.stderr.strip().splitlines()[-1], flush=True)
            continue
        groups = read()
        last = done.stdout.splitlines()[-1]  # onnxruntime's quantizer leaves its progress in front
        found = {**groups[given.group].get(name, {}), **json.loads(last[last.index("{") :])}
        groups[given.group][name] = found
        write(groups)
        print(name, found, flush=True)


if __name__ == "__main__":
    main()
