"""The two sides of benchmarks.delta, each a process of its own that makes one step when it is asked: `python -m benchmarks.delta_arms`.

Requests and answers are lines of JSON. Memory is the peak of the resident set since the last build.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.contestant import megabytes
from benchmarks.delta_data import Batch, Decoder, Encoder, Rows, rows_of, source
from bmgraph.utils.host_memory import give_back_memory

METHODS: dict[str, dict[str, Any]] = {
    "head": {"lr": 1e-2},
    "lora": {"lr": 2e-3},
    "ia3": {"lr": 1e-2},
    "adapter": {"lr": 1e-3},
    "bitfit": {"lr": 2e-3},
    "soft": {"lr": 1e-2},
    "prefix": {"lr": 1e-2},
    "full": {"lr": 1e-4},
}
"""The learning rate of AdamW, constant and without decay, for both sides."""

TOKENS = 16
"""Of soft prompts and prefixes."""

RANK = 8
EVALUATED = 20
"""Rows that are evaluated at once."""


def shuffled(rows: Rows, size: int, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Rows in batches for ever, the same for both sides."""
    random = Random(seed)
    while True:
        order = random.sample(rows.train, len(rows.train))
        yield from (order[place : place + size] for place in range(0, len(order), size))


class Side(ABC):
    """What both sides have in common: the rows, and how a step and a test are timed."""

    def __init__(self, task: str, tested: int) -> None:
        self.task, self.tested = task, tested
        self.source: Encoder | Decoder = source(task, len(rows_of(task, 1, 0, tested).classes))
        self._rows: Rows | None = None
        self._batches: Iterator[list[dict[str, Any]]] = iter(())

    def build(self, method: str, shots: int, seed: int, size: int, start: str) -> dict[str, Any]:
        self._rows = rows_of(self.task, shots, seed, self.tested)
        self._batches = shuffled(self._rows, size, seed)
        begin = time.process_time()
        found = self.made(method, seed, Path(start), self.source.batch(self._rows.train[:2]))
        give_back_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
        return {**found, "build_cpu_s": time.process_time() - begin, "built_mb": megabytes("VmRSS")}

    def step(self) -> dict[str, float]:
        batch = self.source.batch(next(self._batches))
        begin, cpu = time.perf_counter(), time.process_time()
        loss = self.stepped(batch)
        return {"loss": loss, "s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}

    def test(self) -> dict[str, float]:
        peak = megabytes("VmHWM")
        assert self._rows is not None
        test = self._rows.test
        parts = [
            self.source.batch(test[place : place + EVALUATED]) for place in range(0, len(test), EVALUATED)
        ]
        return {"accuracy": self.accuracy(parts), "steps_peak_mb": peak}

    @abstractmethod
    def made(self, method: str, seed: int, start: Path, example: Batch) -> dict[str, Any]:
        """Build what trains from the weights of the model, and save its first values to a folder, or read them there."""

    @abstractmethod
    def stepped(self, batch: Batch) -> float:
        """One step; the loss."""

    @abstractmethod
    def accuracy(self, parts: list[Batch]) -> float:
        """The share of rows that are right."""

    @abstractmethod
    def zero(self) -> dict[str, Any]:
        """Classes of the untrained model."""


class Ours(Side):
    """bmgraph: the model is captured once, and every method is passes on that program."""

    def __init__(self, task: str, tested: int) -> None:
        import bmgraph as bg

        super().__init__(task, tested)
        example = self.source.batch(rows_of(task, 2, 0, tested).train[:4])
        begin = time.process_time()
        loss_reads = set(example) - {"input_ids", "attention_mask"}
        self.program = bg.capture(self.source.model, example, prove="training", unread=loss_reads)
        self.capture_cpu_s = time.process_time() - begin
        self.source.model = torch.nn.Module()  # the program has its weights

    def made(self, method: str, seed: int, start: Path, example: Batch) -> dict[str, Any]:
        import bmgraph as bg
        from bmgraph.backends import AdamW, Torch
        from bmgraph.passes import IA3, Adapter, BitFit, LoRA, SoftPrompt

        self.trainer: Any = None
        saved = () if isinstance(self.source, Decoder) else ("head",)
        passes: dict[str, list[Any]] = {
            "head": [], "full": [],
            "lora": [LoRA(r=RANK, alpha=2 * RANK, roles=("attention.q", "attention.v"), modules_to_save=saved, seed=seed)],
            "ia3": [IA3(modules_to_save=saved)],
            "adapter": [Adapter(2 * RANK, modules_to_save=saved, seed=seed)],
            "bitfit": [BitFit(modules_to_save=saved)],
            "soft": [SoftPrompt(TOKENS, seed=seed)],
        }  # fmt: skip
        if method == "prefix":
            from bmgraph.passes import Prefix

            passes["prefix"] = [Prefix(TOKENS, seed=seed)]
        program = self.program.clone()
        program.frozen = frozenset()
        if method == "head":
            program.frozen = frozenset(name for name in program.parameters if not name.startswith("head."))
        program = bg.Pipeline(passes[method]).run(program, verify="structure")
        trained = [name for name in program.parameters if name not in program.frozen]
        if method == "soft":
            torch.save(program.parameters[trained[0]].clone().reshape(TOKENS, -1), start / "start.pt")
        elif method not in ("head", "full", "adapter", "bitfit"):
            program.save_delta(start / "delta")
        backend = Torch(optimizer=AdamW(lr=METHODS[method]["lr"], weight_decay=0.0), loss=self.source.loss)
        self.trainer = bg.compile(program, backend=backend, verify="structure")
        count = sum(program.parameters[name].numel() for name in trained)
        whole = sum(value.numel() for value in self.program.parameters.values())
        return {"trained": count, "share": count / whole, "capture_cpu_s": self.capture_cpu_s}

    def stepped(self, batch: Batch) -> float:
        return float(self.trainer.step(batch).loss)

    def accuracy(self, parts: list[Batch]) -> float:
        from bmgraph.prompting.class_counts import ClassCounts

        assert self._rows is not None
        if isinstance(self.source, Decoder):
            measure = self.source.task.measure
        else:
            measure = ClassCounts(self.source.scores, self._rows.classes)
        return float(self.trainer.evaluate(parts, measure=measure).measures["accuracy"])

    def zero(self) -> dict[str, Any]:
        """Zero-shot and calibrated, by an engine with the task."""
        import bmgraph as bg

        assert isinstance(self.source, Decoder)
        test = rows_of(self.task, 1, 0, self.tested).test
        engine: Any = bg.compile(
            self.program, backend="torch", resources={"task": self.source.task}, verify="structure"
        )
        begin = time.process_time()
        plain = engine.classify(test, batch_size=EVALUATED)
        seconds = time.process_time() - begin
        right = [engine.task.classes[row["label"]] for row in test]
        found = {"classes": plain, "accuracy": _share(plain, right), "cpu_s": seconds}
        engine.calibrate(["", "N/A", "[MASK]"])
        return {**found, "calibrated": _share(engine.classify(test, batch_size=EVALUATED), right)}


class Theirs(Side):
    """PEFT, or plain PyTorch where nothing is added; each method on the same model, which gets its weights back."""

    def __init__(self, task: str, tested: int) -> None:
        super().__init__(task, tested)
        self._folder = tempfile.TemporaryDirectory()
        self._weights = f"{self._folder.name}/weights.pt"
        torch.save(self.source.model.state_dict(), self._weights)
        self.net: Any = self.source.model
        self.shift = 0

    def made(self, method: str, seed: int, start: Path, example: Batch) -> dict[str, Any]:
        import peft

        unload = getattr(self.net, "unload", None)
        self.net = self.source.model if unload is None or self.shift else unload()
        self.shift = 0
        model = self.source.model = self.net
        self.net.requires_grad_(True)
        self.net.load_state_dict(torch.load(self._weights, mmap=True))
        if method == "head":
            for name, value in model.named_parameters():
                value.requires_grad_(name.startswith("head."))
        elif method == "soft":
            config = peft.PromptTuningConfig(num_virtual_tokens=TOKENS, task_type="CAUSAL_LM")
            self.net, self.shift = peft.get_peft_model(model, config), TOKENS
            with torch.no_grad():
                self.net.prompt_encoder["default"].embedding.weight.copy_(torch.load(start / "start.pt"))
        elif method == "prefix":  # PEFT trains none that it has loaded
            config = peft.PeftConfig.from_pretrained(str(start / "delta"))
            config.inference_mode = False
            self.net = peft.get_peft_model(model, config)
            peft.set_peft_model_state_dict(self.net, peft.load_peft_weights(str(start / "delta")))
        elif method != "full":
            self.net = peft.PeftModel.from_pretrained(model, str(start / "delta"), is_trainable=True)
        trained = [value for value in self.net.parameters() if value.requires_grad]
        self.rule = torch.optim.AdamW(trained, lr=METHODS[method]["lr"], weight_decay=0.0, fused=True)
        return {"trained": sum(value.numel() for value in trained)}

    def _outputs(self, batch: Batch) -> Any:
        return self.net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    def stepped(self, batch: Batch) -> float:
        self.net.train()
        self.rule.zero_grad(set_to_none=True)
        scores = self.source.scores(self._outputs(batch), batch, self.shift)
        loss = torch.nn.functional.cross_entropy(scores, batch["label"])
        loss.backward()
        self.rule.step()
        return float(loss.detach())

    def accuracy(self, parts: list[Batch]) -> float:
        self.net.eval()
        right = 0
        with torch.no_grad():
            for batch in parts:
                found = self.source.scores(self._outputs(batch), batch, self.shift).argmax(-1)
                right += int((found == batch["label"]).sum())
        return right / sum(len(batch["label"]) for batch in parts)

    def zero(self) -> dict[str, Any]:
        """Zero-shot by a loop over texts, one at a time."""
        assert isinstance(self.source, Decoder)
        test = rows_of(self.task, 1, 0, self.tested).test
        begin = time.process_time()
        found = [int(self.source.by_hand(row["text_a"]).argmax()) for row in test]
        right = sum(one == row["label"] for one, row in zip(found, test))
        return {
            "classes": [str(one) for one in found], "accuracy": right / len(test), "cpu_s": time.process_time() - begin,
        }  # fmt: skip


def _share(found: list[str], right: list[str]) -> float:
    return sum(one == other for one, other in zip(found, right)) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=("ours", "theirs"))
    parser.add_argument("task")
    parser.add_argument("tested", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    side = (Ours if options.side == "ours" else Theirs)(options.task, options.tested)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        call: Callable[..., dict[str, Any]] = getattr(side, request.pop("do"))
        print(json.dumps(call(**request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
