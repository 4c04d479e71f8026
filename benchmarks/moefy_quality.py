"""What MoEfied models keep, against the share of experts that are active: of anarcii without training, of MiniLM after Relufy.

    python -m benchmarks.moefy_quality [--only anarcii relufy minilm recovered]

anarcii (ReLU, an encoder-decoder): the share of residues of held-out antibodies that get the number of the whole model. MiniLM
(GELU): mean cosine of sentence embeddings to the published model's and the accuracy of a probe, on questions that no step has seen;
the share of activation mass (`labels=norm`: of squared norms) that chosen experts capture, for the router and the best choice, on
held-out calibration tokens.
"relufy" trains in chunks of steps, each with a new optimizer, and goes on where it stopped; "recovered" distills with routers in place.
Rows are written to `results/moefy.json` as they come, and those that stand there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bmgraph as bg
from benchmarks import assets
from benchmarks.encoder import cosine
from benchmarks.probes import Batch, accuracy, embed
from benchmarks.smollm2 import text
from bmgraph.backends import AdamW, Torch
from bmgraph.ir.pass_record import machine
from bmgraph.ir.program import Program
from bmgraph.passes import Distill, MoEfy, Relufy

RESULTS = Path(__file__).parent / "results" / "moefy.json"
STORE = assets.CACHE / "moefy"

EXPERTS = 32
SPLITS = ("cluster", "coactivation", "random")
ROUTERS = ("trained", "similarity")

LENGTH, ROWS, RATES = 32, 16, (3e-4, 3e-4, 1e-4)
"""Tokens of a row, rows of a batch, the learning rate of each chunk."""
CHUNK = 50
CALIBRATION, TOKENS = 16, 8192
PROBED, HELD_OUT = 2000, 500
"""Questions that the probe is trained on, and questions that it is tested on."""
RECOVERY = 100

Row = dict[str, Any]


def pipeline(program: Program, passes: list[Any], **options: Any) -> Program:
    """Passes without bounds on drift: what they cost is what is measured."""
    return bg.Pipeline(passes).run(program, max_drift=math.inf, **options)


def told(program: Program) -> Row:
    """What the report of MoEfy says on average over layers."""
    edits = [edit.what for edit in program.history[-1].edits]
    shares = [[int(part) / 100 for part in re.findall(r"(\d+)%", what)] for what in edits]
    found = [pair for pair in shares if len(pair) == 2]
    if not found:
        return {}
    chosen, best = (statistics.mean(column) for column in zip(*found))
    return {"captured": round(chosen, 4), "captured_by_best": round(best, 4)}


# --- anarcii


@cache
def antibodies() -> tuple[Program, Any, Any]:
    """The whole model, the sequences that it is calibrated on, and those that it is measured on."""
    from examples.antibodies import ANTIBODIES, SEEN, number, trained, variants

    model = trained()
    numbering = number(model, ANTIBODIES)
    seen = variants(numbering, range(SEEN), 12, 0)
    held_out = variants(numbering, range(SEEN, len(ANTIBODIES)), 12, 1)
    return bg.capture(model, seen.batch), seen, held_out


def anarcii(**options: Any) -> Row:
    """The share of residues that a MoEfied model numbers as the whole one does."""
    program, seen, held_out = antibodies()
    whole = held_out.agreement(program(**held_out.batch)["output"])
    done = pipeline(program, [MoEfy(EXPERTS, **options)], calibration=[seen.batch])
    agreement = held_out.agreement(done(**held_out.batch)["output"])
    return {"whole": whole, "agreement": agreement, "kept": agreement / whole, **told(done)}


# --- MiniLM


class Sentences:
    """The encoder, text to train on, and questions to compare embeddings and train probes on."""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = str(assets.minilm())
        self.model, tokenizer = (
            AutoModel.from_pretrained(folder).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        lines = [line.strip() for line in text("train", 3_000_000).splitlines() if len(line) > 80]
        sentences = [sentence for sentence, _ in assets.rotten_tomatoes()]
        mixed = [item for pair in zip(lines, sentences) for item in pair]
        self._ids = tokenizer(
            mixed, truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt"
        )
        questions = assets.trec()[: PROBED + HELD_OUT]
        self.labels = np.array([label for _, label in questions])
        self._questions, self._tokenizer = [question for question, _ in questions], tokenizer
        self.program = bg.capture(self.model, self.batch(0))
        self.wanted = self.embeddings(self.program)

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        places = torch.arange(step * ROWS, (step + 1) * ROWS) % len(self._ids["input_ids"])
        return {name: self._ids[name][places] for name in ("input_ids", "attention_mask")}

    def calibration(self) -> list[Batch]:
        """Batches that no step has seen."""
        return [self.batch(10_000 // ROWS + step) for step in range(CALIBRATION)]

    def embeddings(self, call: Callable[..., Any]) -> np.ndarray:
        """f[N, 384]: the mean of the last hidden state of each question."""
        with torch.no_grad():
            return embed(
                lambda batch: call(**batch)["last_hidden_state"], self._tokenizer, self._questions, LENGTH
            )

    def score(self, call: Callable[..., Any]) -> Row:
        """Cosine to the published model on held-out questions, and accuracy of a probe."""
        found = self.embeddings(call)
        near = cosine(found[PROBED:], self.wanted[PROBED:], None)
        right = accuracy(found, self.labels, slice(PROBED), slice(PROBED, None))
        return {"cosine": round(near, 4), "probe": round(right, 4)}


@cache
def sentences() -> Sentences:
    """Read once."""
    return Sentences()


def stored(steps: int) -> Path:
    """Where the program after some steps is kept."""
    return STORE / f"relufied-{steps}"


def relufy(steps: int) -> Row:
    """Train for one more chunk, up to `steps`."""
    data, first = sentences(), steps - CHUNK
    resources = {
        "teacher": data.model,
        "text": [data.batch(first + step) for step in range(CHUNK)],
        "trainer": Torch(optimizer=AdamW(lr=RATES[first // CHUNK], weight_decay=0.0), clip_norm=1.0),
    }
    on = ("outputs", "hidden")
    if first:
        loaded: Any = bg.load(stored(first))
        done = pipeline(loaded, [Distill(steps=CHUNK, on=on)], resources=resources)
    else:
        plain = pipeline(data.program, [Relufy(steps=0)])
        print("activations changed, no step", data.score(plain), flush=True)
        done = pipeline(data.program, [Relufy(steps=CHUNK)], resources=resources)
    STORE.mkdir(parents=True, exist_ok=True)
    done.save(str(stored(steps)))
    losses = re.findall(r"loss ([\d.e-]+) -> ([\d.e-]+)", done.history[-1].edits[-1].what)[-1]
    return {"zeros": zeros(done), "loss": [float(item) for item in losses], **data.score(done)}


def zeros(program: Program) -> float:
    """The share of activations of feed-forwards that are not above 0, on one batch."""
    from bmgraph.analysis.interpreter import Observed

    nodes = [
        node.name
        for node in program.graph.nodes
        if node.target in (torch.ops.aten.relu.default, torch.ops.aten.gelu.default)
    ]
    found: list[float] = []
    Observed(program).run(
        sentences().calibration()[0],
        set(nodes),
        lambda _, value: found.append(float((value <= 0).double().mean())),
    )
    return round(statistics.mean(found), 4)


def minilm(steps: int, **options: Any) -> Row:
    """A MoEfied encoder: of the published model, or of the one that was trained for `steps`."""
    data = sentences()
    program: Any = bg.load(stored(steps)) if steps else data.program
    done = pipeline(
        program, [MoEfy(EXPERTS, tokens=TOKENS, labels="mass", **options)], calibration=data.calibration()
    )
    return {**told(done), **data.score(done)}


def recovered(steps: int, **options: Any) -> Row:
    """Experts distilled with their routers in place, and how they were before."""
    data = sentences()
    program: Any = bg.load(stored(steps))
    done = pipeline(
        program, [MoEfy(EXPERTS, tokens=TOKENS, labels="mass", **options)], calibration=data.calibration()
    )
    before = data.score(done)
    batches = [data.batch(steps + step) for step in range(RECOVERY)]
    trainer = Torch(optimizer=AdamW(lr=1e-4, weight_decay=0.0), clip_norm=1.0)
    done = pipeline(
        done,
        [Distill(steps=RECOVERY, on=("outputs", "hidden"))],
        resources={"teacher": data.model, "text": batches, "trainer": trainer},
    )
    return {"before": before, **data.score(done)}


# --- rows


def rows(steps: int) -> Iterator[tuple[str, str, Callable[[], Row]]]:
    """Group, name and measurement of every row, in order."""
    for labels, active in (("mass", 8), ("mass", 4), ("norm", 8)):
        for split in SPLITS:
            for router in ROUTERS if active == 8 else ROUTERS[:1]:
                options = {"labels": labels, "active": active, "split": split, "router": router}
                yield "anarcii", _name(**options), partial(anarcii, **options)
    for options in ({"active": 8, "shared": 1}, {"active": "auto", "average": 4.0}):
        options |= {"split": "coactivation", "labels": "mass"}
        yield "anarcii", _name(**options), partial(anarcii, **options)
    for done in range(CHUNK, steps + 1, CHUNK):
        yield "relufy", f"{done} steps", partial(relufy, done)
    for active, trained in ((8, steps), (4, steps), (8, 0), (16, steps), (2, steps)):
        for split in SPLITS:
            options = {"active": active, "split": split}
            model = "relu" if trained else "gelu"
            yield "minilm", f"{model}, {_name(**options)}", partial(minilm, trained, **options)
    for router in ROUTERS[1:]:
        options = {"active": 8, "split": "coactivation", "router": router}
        yield "minilm", f"relu, {_name(**options)}", partial(minilm, steps, **options)
    for split in ("coactivation", "random"):
        options = {"active": 8, "split": split}
        yield "recovered", _name(**options), partial(recovered, steps, **options)


def written() -> dict[str, Any]:
    """What stands in the file, to which other processes write too."""
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    return found


def _name(**options: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def main() -> None:
    """Measure what is not there yet, and write each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["anarcii", "relufy", "minilm", "recovered"])
    parser.add_argument("--steps", type=int, default=CHUNK * len(RATES), help="steps of Relufy, in chunks")
    parser.add_argument("--minutes", type=float, default=60.0, help="when to stop")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    begin = time.perf_counter()
    for group, name, measure in rows(given.steps):
        if group not in given.only or name in written()["rows"].get(group, {}):
            continue
        if time.perf_counter() - begin > 60 * given.minutes:
            break
        started = time.process_time()
        row = {**measure(), "cpu_s": round(time.process_time() - started, 1)}
        print(group, "|", name, "|", row, flush=True)
        content = written()
        content["rows"].setdefault(group, {})[name] = row
        content |= {"experts": EXPERTS, "batch": [ROWS, LENGTH], "rates": RATES, "machine": machine()}
        RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
