"""MiniLM with half of its operations: shrunk, then distilled on text without labels; probes, bytes, and speed beside NNCF.

The student is trained in chunks, each of which begins with the weights of the one before and a new optimizer: a run that is stopped goes on.
Its text is WikiText-2, sentences of film reviews and short texts of another package, none of which a probe reads. After the first round
of steps every other batch is of questions: those of a phrase book, and phrases of WikiText-2 behind the beginning of a question.
`--stage speed` and `--stage probes` measure the student as it is then.

    python -m benchmarks.half --stage train --minutes 60
    python -m benchmarks.half --stage probes
    python -m benchmarks.half --stage speed
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bmgraph as bg
from benchmarks import assets, encoders, peers
from benchmarks.contestant import versions
from benchmarks.encoder import SIZES
from benchmarks.kept_program import keep, kept, steps_of
from benchmarks.probes import accuracies, embed, tokenized
from benchmarks.smollm2 import text
from bmgraph.backends import AdamW, OpenVINO, Torch
from bmgraph.ir.pass_record import machine
from bmgraph.passes import Distill, Quantize, Shrink

RESULTS = Path(__file__).parent / "results" / "half.json"
STORE = assets.CACHE / "half"

SHAPES: dict[str, Any] = {
    "3 of 6 layers": [Shrink(layers=0.5)],
    "4 of 6 layers, 0.64 of their feed-forwards": [
        Shrink(layers=2 / 6),
        Shrink(ffn=0.36, score="activation"),
    ],
}
"""Student -> what makes it smaller."""

ROWS, LENGTH, RATE, ROUND, CHUNK = 32, 64, 3e-4, 1750, 250
STEPS = 3 * ROUND
"""Steps of three rounds, each with a cosine of its own."""

QUESTIONS = 96
"""Texts of a batch of questions, which are short."""

BEGINNINGS = (
    "What is", "What are", "What was", "What does", "What kind of", "What", "Which", "Who is", "Who was", "Who", "Whose", "Where is",
    "Where was", "Where are", "When is", "When was", "When did", "Why is", "Why does", "Why did", "How is", "How does", "How did",
    "How many", "How much", "How long is", "How far is", "How old is", "What is the name of", "Name", "What year was", "In what",
)  # fmt: skip
"""Of questions that end in a phrase of a text."""

SPLITS, TRAINED = 10, 0.8
"""Splits of a probe into texts that train and texts that test, and the share of the first."""

CUT = {"trec": 64, "sms": 96, "imdb": 96}
"""The most tokens of a text that a probe reads."""

REVIEWS = 5000
"""How many of the 24,904 reviews a probe reads."""


@cache
def texts() -> list[str]:
    """Texts without labels, shuffled: lines of WikiText-2 cut at random, sentences of film reviews, short texts."""
    found = [item for item, _ in assets.rotten_tomatoes()]
    found += assets.short_texts()
    order = random.Random(0)
    for line in text("train", 20_000_000).splitlines():
        words = line.split()
        while len(words) > 5:
            size = min(len(words), order.randint(5, 50))
            found.append(" ".join(words[:size]))
            words = words[size:]
    order.shuffle(found)
    return found


@cache
def questions() -> list[str]:
    """Questions without answers, shuffled: half those of the phrase book in turn, half made of phrases."""
    order = random.Random(1)
    asked = [item for item in assets.sentences() if item.endswith("?")]
    found = []
    for line in text("train", 20_000_000).splitlines():
        words = line.split()
        while len(words) > 8:
            size = min(len(words), order.randint(2, 9))
            phrase = " ".join(words[:size])
            found += [f"{order.choice(BEGINNINGS)} {phrase} ?", asked[len(found) // 2 % len(asked)]]
            words = words[size + order.randint(8, 40) :]
    order.shuffle(found)
    return found


class Student:
    """A shape in training, kept in a folder after each chunk."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, STORE / name.replace(" ", "-").replace(",", "")
        self.encoder = encoders.minilm()
        self.teacher = bg.capture(self.encoder.model, self.encoder.batch(0, 8, 64, 24))

    @property
    def steps(self) -> int:
        """The number of steps of the one that is kept; -1 without one."""
        found = steps_of(self.folder)
        return -1 if found is None else found

    def program(self) -> Any:
        """The student as it is."""
        return kept(self.folder)

    def begin(self) -> None:
        """Make it smaller."""
        done = bg.Pipeline(SHAPES[self.name]).run(
            self.teacher, calibration=self.encoder.calibration(), max_drift=50.0
        )
        keep(done, self.folder, 0)

    def train(self, batches: list[dict[str, torch.Tensor]]) -> str:
        """Distill for a chunk, with the rate of its place in a cosine; how the loss went."""
        first = self.steps
        rate = RATE * (0.02 + 0.98 * (1 + math.cos(math.pi * (first % ROUND) / ROUND)) / 2)
        done = bg.Pipeline([Distill(on=("outputs", "hidden"), steps=len(batches))]).run(
            self.program(),
            resources={
                "teacher": self.teacher,
                "text": batches,
                "trainer": Torch(optimizer=AdamW(lr=rate, weight_decay=0.0), clip_norm=1.0),
            },
            max_drift=50.0,
            verify="structure",
        )
        keep(done, self.folder, first + len(batches))
        return str(done.history[-1].edits[0].what)

    def batches(self, first: int, count: int) -> list[dict[str, torch.Tensor]]:
        """The batches of some steps."""
        found = []
        for step in range(first, first + count):
            asks = step >= ROUND and step % 2
            known, size = (questions(), QUESTIONS) if asks else (texts(), ROWS)
            rows = [known[(step * size + row) % len(known)] for row in range(size)]
            found.append(tokenized(self.encoder.tokenizer, rows, LENGTH))
        return found


def train(content: dict[str, Any], names: list[str], minutes: float, steps: int) -> None:
    """Train in turn until the time is over."""
    begin = time.monotonic()
    students = [Student(name) for name in names]
    for student in students:
        if student.steps < 0:
            student.begin()
    while any(student.steps < steps for student in students):
        for student in students:
            if student.steps >= steps or time.monotonic() - begin > 60 * minutes:
                continue
            started = time.process_time()
            told = student.train(student.batches(student.steps, CHUNK))
            row = content.setdefault("training", {}).setdefault(student.name, {})
            row[str(student.steps)] = {"told": told, "cpu_s": time.process_time() - started}
            write(content)
            print(student.name, student.steps, told, flush=True)
        if time.monotonic() - begin > 60 * minutes:
            break


Call = Callable[[dict[str, torch.Tensor]], Any]


def probes(content: dict[str, Any], name: str) -> None:
    """Probes of the published model, the student in fp32 and its int8 engine."""
    student = Student(name)
    program, model = student.program(), student.encoder.model
    engine = compiled(program, student.encoder, "dynamic")

    def eager(batch: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**batch).last_hidden_state

    calls: dict[str, Call] = {
        "published": eager,
        "student": lambda batch: program(**batch)["last_hidden_state"].detach(),
        "student int8": lambda batch: engine(**batch)["last_hidden_state"],
    }
    data = {"trec": assets.trec(), "sms": assets.sms(), "imdb": assets.imdb()[:REVIEWS]}
    found = content.setdefault("probes", {}).setdefault(name, {})
    found["steps"] = student.steps
    for task, items in data.items():
        rows, labels = [item for item, _ in items], [label for _, label in items]
        scores = {
            who: np.array(
                accuracies(
                    embed(call, student.encoder.tokenizer, rows, CUT[task]),
                    labels,
                    int(TRAINED * len(rows)),
                    SPLITS,
                )
            )
            for who, call in calls.items()
        }
        base = scores["published"]
        found[task] = {
            who: {
                "accuracy": float(item.mean()),
                "points less": float(100 * (base - item).mean()),
                "95% of the mean": float(100 * 1.96 * (base - item).std(ddof=1) / math.sqrt(SPLITS)),
            }
            for who, item in scores.items()
        }
        write(content)
        print(name, task, found[task], flush=True)


def compiled(program: Any, encoder: encoders.Encoder, shapes: str = "static") -> Any:
    """The engine in int8, the embeddings too."""
    return bg.compile(
        program,
        [Quantize("int8", embeddings=8)],
        backend=OpenVINO(shapes=shapes),
        calibration=encoder.calibration(),
    )


def speed(content: dict[str, Any], name: str) -> None:
    """Bytes, and time at each size beside NNCF's int8 of the whole model and of the student."""
    import openvino as ov

    student = Student(name)
    program, encoder = student.program(), student.encoder
    engine = compiled(program, encoder)
    with tempfile.TemporaryDirectory() as folder:
        engine.save(f"{folder}/engine")
        size = sum(item.stat().st_size for item in Path(folder, "engine").rglob("*") if item.is_file())
        calls: dict[str, Call] = {
            "student int8": lambda batch: np.asarray(engine(**batch)["last_hidden_state"])
        }
        plain = bg.compile(program, [], backend=OpenVINO())
        plain.save(f"{folder}/student")
        batches = encoder.calibration()
        for who, read in (
            ("whole", peers.openvino_model(encoder.model, batches, Path(folder), "torch", int8=False)),
            ("student", ov.Core().read_model(next(Path(folder, "student").rglob("*.onnx")))),
        ):
            rounded = peers.nncf_int8(read, batches)
            calls[f"nncf of the {who}, static"] = peers.openvino(rounded, 2, static=True)
            calls[f"nncf of the {who}"] = peers.openvino(rounded, 2, static=False)
        whole = sum(item.numel() * item.element_size() for item in encoder.model.parameters())
        found: dict[str, Any] = {"bytes": size, "bytes of the model": whole, "share": size / whole}
        for shape, (rows, longest, shortest) in SIZES.items():
            batch = encoder.batch(0, rows, longest, shortest)
            ready = {who: (lambda call=call, batch=batch: call(batch)) for who, call in calls.items()}
            result = bg.benchmark(ready, batch, warmup=4)
            found[shape] = {
                **result.as_json(),
                "over": {who: result.speedup("student int8", who) for who in list(calls)[1:]},
            }
            print(name, shape, found[shape]["over"], flush=True)
    content.setdefault("speed", {})[name] = found
    write(content)


def write(content: Mapping[str, Any]) -> None:
    """Write the figures."""
    whole = {
        **content,
        "machine": machine(),
        "versions": versions(("torch", "openvino", "nncf", "scikit-learn")),
        "rows, length, rate, steps, chunk, questions": [ROWS, LENGTH, RATE, STEPS, CHUNK, QUESTIONS],
    }
    part = RESULTS.with_suffix(".part")
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.rename(RESULTS)


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("train", "probes", "speed"), required=True)
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="students")
    parser.add_argument("--minutes", type=float, default=20.0, help="when training stops")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.stage == "train":
        train(content, given.only, given.minutes, given.steps)
        return
    for name in given.only:
        (probes if given.stage == "probes" else speed)(content, name)


if __name__ == "__main__":
    main()
