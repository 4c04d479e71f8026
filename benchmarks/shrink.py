"""A quarter less of SmolLM2-135M, by width and by layers, then distillation: perplexity on WikiText-2 after each chunk of steps.

Beside `Shrink` and `Distill` stand the same in plain PyTorch, as one would write it first: layers at equal distances, or the channels of
the smallest columns of the embedding table, removed by slicing weights, and a loop of KL divergence with torch's AdamW. The same text, batches,
learning rate and number of steps for all. It stops after `--minutes` and goes on where it stopped; `--only` chooses contestants. A chunk
begins with a new optimizer, so that a stopped run and one that goes through are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import assets
from benchmarks.kept_program import keep
from benchmarks.smollm2 import WINDOW, WINDOWS, loaded, text
from bmgraph.ir.pass_record import machine

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "shrink.json"
STORE = assets.CACHE / "shrink"

CASES: dict[str, Any] = {
    "fp32": None,
    "layers by redundancy": {"layers": 0.25},
    "layers by taylor": {"layers": 0.25, "score": "taylor"},
    "layers at random": {"layers": 0.25, "score": "random"},
    "hidden by activation": {"hidden": 0.25, "score": "activation"},
    "hidden by magnitude": {"hidden": 0.25},
    "hidden at random": {"hidden": 0.25, "score": "random"},
    "plain torch, layers": "layers",
    "plain torch, hidden": "hidden",
}
"""Contestant -> the options of Shrink, or what plain PyTorch cuts."""

LENGTH, ROWS, RATE, CALIBRATION = 128, 2, 2e-4, 16
STEPS, CHUNK = 500, 50


class Data:
    """Windows of WikiText-2: those of the training part in batches by step, and those of the test part that are scored."""

    def __init__(self, tokenizer: Any) -> None:
        ids = torch.tensor(tokenizer(text("train", 2_000_000))["input_ids"])
        self._rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        self._order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(0))
        tested = torch.tensor(tokenizer(text("test"))["input_ids"][: WINDOW * WINDOWS])
        self._program: Any = None
        self.windows = tested.reshape(WINDOWS, 1, WINDOW)

    def captured(self, model: Any) -> Any:
        """The model as a program, captured once."""
        import bmgraph as bg

        if self._program is None:
            self._program = bg.capture(model, self.batch(0))
        return self._program

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step, with its labels."""
        places = torch.arange(step * ROWS, (step + 1) * ROWS) % len(self._order)
        ids = self._rows[self._order[places]]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def perplexity(self, call: Any) -> float:
        """exp of the mean loss of all tokens but the first of each window."""
        losses = []
        for window in self.windows:
            with torch.no_grad():
                logits = call(input_ids=window, attention_mask=torch.ones_like(window))["logits"]
            losses.append(float(functional.cross_entropy(logits[0, :-1].float(), window[0, 1:])))
        return math.exp(statistics.mean(losses))


class Ours:
    """Shrink and Distill."""

    def __init__(self, name: str, options: dict[str, Any], model: Any, data: Data) -> None:
        self.folder, self.model, self.data = STORE / name.replace(" ", "-"), model, data
        self.options = options

    def begin(self) -> None:
        """Make it smaller."""
        import bmgraph as bg
        from bmgraph.passes import Shrink

        program = self.data.captured(self.model)
        calibration = [self.data.batch(100_000 + step) for step in range(CALIBRATION)]
        self.program = bg.Pipeline([Shrink(**self.options)]).run(
            program, calibration=calibration, max_drift=50.0
        )
        keep(self.program, self.folder, 0)

    def train(self, first: int, steps: int) -> None:
        """Distill for some steps."""
        import bmgraph as bg
        from bmgraph.backends import AdamW, Torch
        from bmgraph.passes import Distill

        batches = [self.data.batch(first + step) for step in range(steps)]
        self.program = bg.Pipeline([Distill(steps=steps)]).run(
            self.program,
            resources={
                "teacher": self.model,
                "text": batches,
                "trainer": Torch(optimizer=AdamW(lr=RATE, weight_decay=0.0)),
            },
            max_drift=50.0,
            verify="structure",
        )
        keep(self.program, self.folder, first + steps)

    def load(self, steps: int) -> None:
        """Read what was saved."""
        import bmgraph as bg

        loaded: Any = bg.load(self.folder / str(steps))
        self.program = loaded

    def score(self) -> dict[str, float]:
        """Perplexity and size."""
        labels = self.data.windows[0]
        return {
            "perplexity": self.data.perplexity(lambda **batch: self.program(**batch, labels=labels)),
            "parameters": sum(item.numel() for item in self.program.parameters.values()),
        }


class Plain:
    """The same in plain PyTorch."""

    def __init__(self, name: str, cut: str, model: Any, data: Data) -> None:
        self.file, self.teacher, self.data, self.cut = (
            STORE / f"{name.replace(' ', '-')}.pt",
            model,
            data,
            cut,
        )

    def begin(self) -> None:
        """Slice its weights."""
        import copy

        self.student = copy.deepcopy(self.teacher)
        model = self.student.model
        if self.cut == "layers":
            count, fewer = len(model.layers), len(model.layers) // 4
            gone = {int((place + 0.5) * count / fewer) for place in range(fewer)}
            model.layers = torch.nn.ModuleList(
                item for place, item in enumerate(model.layers) if place not in gone
            )
        else:
            self._narrow(model)
        self.keep()

    def _narrow(self, model: Any) -> None:
        table = model.embed_tokens.weight.data
        left = table.norm(dim=0).argsort(descending=True)[: table.shape[1] * 3 // 4].sort().values
        model.embed_tokens.weight.data = table[:, left].clone()
        self.student.lm_head.weight = model.embed_tokens.weight
        for layer in model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.data = norm.weight.data[left].clone()
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                linear.weight.data = linear.weight.data[:, left].clone()
            for linear in (attention.o_proj, mlp.down_proj):
                linear.weight.data = linear.weight.data[left].clone()
        model.norm.weight.data = model.norm.weight.data[left].clone()

    def train(self, first: int, steps: int) -> None:
        """KL divergence of the teacher's distribution at each position."""
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, weight_decay=0.0)
        for step in range(first, first + steps):
            batch = {key: value for key, value in self.data.batch(step).items() if key != "labels"}
            with torch.no_grad():
                wanted = functional.log_softmax(self.teacher(**batch)["logits"], -1)
            found = functional.log_softmax(self.student(**batch)["logits"], -1)
            loss = functional.kl_div(found, wanted, log_target=True, reduction="sum") / wanted[..., 0].numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.keep()

    def keep(self) -> None:
        """Save it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.student.state_dict(), self.file)

    def load(self, steps: int) -> None:
        """Read what was saved."""
        saved = torch.load(self.file, weights_only=True)
        self.begin()
        self.student.load_state_dict(saved)
        self.keep()

    def score(self) -> dict[str, float]:
        """Perplexity and size."""
        return {
            "perplexity": self.data.perplexity(self.student),
            "parameters": sum(item.numel() for item in self.student.parameters()),
        }


def chunks(done: dict[str, Any], names: list[str], steps: int) -> Iterator[tuple[str, int]]:
    """What is to do next: all contestants in turn, so that a stopped run has equal numbers of steps."""
    for name in names:
        if not done.get(name):
            yield name, -1
    for first in range(0, steps, CHUNK):
        for name in names:
            if name != "fp32" and str(first + CHUNK) not in done.get(name, {}):
                yield name, first


def main() -> None:
    """Run until the time is over, and write `results/shrink.json` after each chunk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(CASES), help="contestants")
    parser.add_argument("--minutes", type=float, default=20.0, help="when to stop")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of distillation")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"curves": {}}
    done: dict[str, Any] = content["curves"]
    begin = time.perf_counter()
    model, tokenizer = loaded()
    data = Data(tokenizer)
    for name, first in list(chunks(done, given.only, given.steps)):
        if time.perf_counter() - begin > 60 * given.minutes:
            break
        started = time.process_time()
        found = _step(name, first, model, data)
        done.setdefault(name, {})[str(first + CHUNK if first >= 0 else 0)] = {
            **found,
            "cpu_s": time.process_time() - started,
        }
        print(name, first, found, flush=True)
        content |= {
            "machine": machine(),
            "windows": [WINDOWS, WINDOW],
            "batch": [ROWS, LENGTH],
            "lr": RATE,
            "chunk": CHUNK,
        }
        RESULTS.write_text(json.dumps(content, indent=2) + "\n")


def _step(name: str, first: int, model: Any, data: Data) -> dict[str, float]:
    case = CASES[name]
    if case is None:
        return {
            "perplexity": data.perplexity(model),
            "parameters": sum(item.numel() for item in model.parameters()),
        }
    contestant: Any = (Plain if isinstance(case, str) else Ours)(name, case, model, data)
    if first < 0:
        contestant.begin()
    else:
        contestant.load(first)
        contestant.train(first, CHUNK)
    found: dict[str, float] = contestant.score()
    return found


if __name__ == "__main__":
    main()
