"""Make a trained sentence encoder smaller in three measured passes: shrink, distill on unlabelled text, int8.

python -m examples.minilm_smaller
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import bmgraph as bg
from benchmarks import assets
from bmgraph.backends import AdamW, Torch
from bmgraph.benchmarking import benchmark
from bmgraph.cli.model_source import Source, open_source
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import Distill, Quantize, Shrink

TRAINED, HELD_OUT = 800, 400
"""Number of texts to train the probe on, and to test it on."""

LENGTH, ROWS = 64, 32
"""Tokens per text (longer texts are truncated), and texts per batch."""

Call = Callable[..., Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """Size, speed and quality after a pass. `milliseconds`: for 8 texts of 128 tokens, the engines of all rows in turn;
    `cosine`: mean cosine to the first program's embeddings on held-out texts; `probe`: accuracy of a logistic
    regression on embeddings."""

    stage: str
    parameters: int
    megabytes: float
    milliseconds: float
    cosine: float
    probe: float


def main() -> None:
    """Run the passes one by one, write figures.json and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/minilm_smaller"))
    parser.add_argument("--ffn", type=float, default=0.5)
    parser.add_argument("--heads", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=int, default=10)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = smaller(
        [Shrink(ffn=options.ffn, heads=options.heads), Distill(on="hidden", steps=options.steps), Quantize("int8")],
        options.runs,
    )  # fmt: skip
    (options.out / "figures.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    Console().print(table(rows))


def smaller(passes: list[Pass], runs: int) -> list[Row]:
    """A row for the published encoder, then one after each pass."""
    source = open_source(str(assets.minilm()))
    questions = assets.trec()
    labelled = questions[: TRAINED + HELD_OUT]
    unlabelled = [text for text, _ in questions[TRAINED + HELD_OUT :]]
    resources = {
        "teacher": source.model,
        "text": source.batches(unlabelled, ROWS, LENGTH),
        "trainer": Torch(optimizer=AdamW(lr=2e-4)),
    }
    program = bg.capture(source.model, source.example)
    first = embeddings(source, program, [text for text, _ in labelled])
    stages = {"as published": program}
    for item in passes:
        calibration = source.batches(unlabelled[:128], ROWS, LENGTH)
        program = bg.Pipeline([item]).run(program, calibration=calibration, resources=resources)
        stages[str(item)] = program
    engines = {stage: bg.compile(program, backend="onnx") for stage, program in stages.items()}
    long = source.batches([" ".join([text] * 20) for text, _ in labelled[:8]], 8, 128)[0]
    times = benchmark(engines, long, runs=runs)
    rows = []
    for stage, engine in engines.items():
        vectors = embeddings(source, engine, [text for text, _ in labelled])
        rows.append(
            Row(
                stage=stage,
                parameters=sum(item.numel() for item in stages[stage].parameters.values()),
                megabytes=(engine.report.bytes or 0) / 1e6,
                milliseconds=times.median(stage),
                cosine=float(torch.cosine_similarity(vectors[TRAINED:], first[TRAINED:]).mean()),
                probe=probe(vectors, [label for _, label in labelled]),
            )
        )
    return rows


def embeddings(source: Source, call: Call, texts: list[str]) -> torch.Tensor:
    """Mean-pooled last hidden states, f32[texts, features]."""
    found = []
    for batch in source.batches(texts, ROWS, LENGTH):
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = torch.as_tensor(call(**batch)["last_hidden_state"])
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def probe(vectors: torch.Tensor, labels: list[str]) -> float:
    """Held-out accuracy of a logistic regression (L-BFGS, a little weight decay) on normalized embeddings."""
    names = sorted(set(labels))
    wanted = torch.tensor([names.index(label) for label in labels])
    x = nn.functional.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
    layer = nn.Linear(x.shape[-1], len(names))
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(layer(x[:TRAINED]), wanted[:TRAINED])
        value = value + 1e-3 * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return float((layer(x[TRAINED:]).argmax(-1) == wanted[TRAINED:]).float().mean())


def table(rows: list[Row]) -> Table:
    """The rows as a table for the terminal."""
    shown = Table("after", "parameters", "MB", "ms", "cosine", "probe", title="MiniLM, pass by pass")
    for row in rows:
        shown.add_row(
            row.stage, f"{row.parameters / 1e6:.1f} M", f"{row.megabytes:.0f}", f"{row.milliseconds:.1f}",
            f"{row.cosine:.4f}", f"{row.probe:.3f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
