"""Loads of bundles beside a process that replaces them at the same path all the time: each gives one that was saved, whole.

Every save holds its number in all of its parts, so that parts of two saves are told from each other.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.deltas.registry import deltas_of
from bmgraph.ir.program import Program
from bmgraph.passes import LoadDelta, LoRA
from tests.helpers.paths import ROOT

NUMBERS = (1.0, 2.0, 3.0)
"""What the saves of a saver hold, in turns."""

WIDTH = 64
_READY = 180.0
_X = torch.ones(2, WIDTH)


class Pair(nn.Module):
    """Two layers whose weights are all `number`, so that the output tells both."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(number)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """x f[B, 64] -> one and other f[B, 64]."""
        return {"one": self.one(x), "other": self.other(x), "loss": (self.one(x) + self.other(x)).mean()}


def _program(number: float) -> Program:
    return bg.capture(Pair(number).eval(), {"x": _X})


def _numbers_of(outputs: dict[str, torch.Tensor]) -> set[float]:
    return {
        round(float(value) / (WIDTH + 1), 3) for name in ("one", "other") for value in outputs[name].flatten()
    }


def _trainer(number: float) -> Any:
    return bg.compile(
        Pair(number), example={"x": _X}, backend=Torch(optimizer=AdamW(lr=0.0, weight_decay=0.0))
    )


def _checkpoint(number: float) -> Callable[[Path], None]:
    trainer = _trainer(number)
    for _ in range(int(number)):
        trainer.step({"x": _X})
    for moments in trainer.update.moments.values():
        for moment in moments.values():
            moment.fill_(number)
    return lambda path: trainer.save(path)  # type: ignore[no-any-return]


def _adapted(number: float) -> Program:
    adapted = bg.Pipeline([LoRA(r=2, alpha=2 * number, targets=("*",))]).run(_program(0.0))
    for delta in deltas_of(adapted.graph):
        for node in delta.tensors.values():
            adapted.parameters[str(node.target)] = torch.full_like(adapted.tensor(str(node.target)), number)
    return adapted


MAKERS: dict[str, Callable[[float], Callable[[Path], None]]] = {
    "program": lambda number: _program(number).save,
    "engine": lambda number: bg.compile(Pair(number).eval(), example={"x": _X}, backend=Onnx(threads=1)).save,
    "checkpoint": _checkpoint,
    "adapter": lambda number: _adapted(number).save_delta,
}
"""Kind of bundle -> a function that makes one with a number, and gives the function that saves it."""


def _of_outputs(path: Path) -> Callable[[], set[float]]:
    return lambda: _numbers_of(bg.load(path)(x=_X))


def _of_checkpoint(path: Path) -> Callable[[], set[float]]:
    trainer = _trainer(0.0)

    def load() -> set[float]:
        trainer.load(path)
        values = [*trainer.state.tensors.values()]
        values += [value for moments in trainer.update.moments.values() for value in moments.values()]
        counts = {float(trainer.steps), float(trainer.update.count)}
        return {float(number) for value in values for number in value.flatten()} | counts

    return load


def _of_adapter(path: Path) -> Callable[[], set[float]]:
    program = _program(0.0)
    program.fingerprint = ""

    def load() -> set[float]:
        adapted = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": path}, verify="off")
        deltas = deltas_of(adapted.graph)
        factors = [adapted.tensor(str(node.target)) for item in deltas for node in item.tensors.values()]
        return {float(number) for value in factors for number in value.flatten()} | {
            item.numbers["scale"] for item in deltas
        }

    return load


LOADERS: dict[str, Callable[[Path], Callable[[], set[float]]]] = {
    "program": _of_outputs,
    "engine": _of_outputs,
    "checkpoint": _of_checkpoint,
    "adapter": _of_adapter,
}
"""Kind of bundle -> a function that makes what loads it, and gives the function that loads once and says which numbers it found."""


def save_forever(kind: str, path: Path) -> None:
    """What a saving process runs: it says "ready" after the first save, and keeps how many there were in a file, never half-written."""
    torch.set_num_threads(1)
    savers = [MAKERS[kind](number) for number in NUMBERS]
    count = 0
    while True:
        savers[count % len(savers)](path)
        count += 1
        (path.parent / "count.new").write_text(str(count))
        (path.parent / "count.new").replace(path.parent / "count")
        if count == 1:
            print("ready", flush=True)


def load_beside_a_saver(kind: str, folder: Path, count: int) -> Iterator[tuple[str, float]]:
    """What was wrong with each of `count` loads ("" if nothing), and its seconds; at last, with how few saves if they were few."""
    from bmgraph.errors import BundleError

    path = folder / kind
    load = LOADERS[kind](path)
    code = f"from pathlib import Path; from tests.helpers.attacks.savers import save_forever; save_forever({kind!r}, Path({str(path)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        refused = 0
        for _ in range(count):
            began = time.perf_counter()
            try:
                found = load()
                wrong = "" if len(found) == 1 and found <= set(NUMBERS) else f"mixed: {sorted(found)[:6]}"
            except BundleError:
                refused += 1
                wrong = ""
            yield wrong, time.perf_counter() - began
        saves = int((folder / "count").read_text())
        few = saves < count // 20 or refused > count // 2
        yield (f"{saves} saves beside {count} loads, {refused} refused" if few else ""), 0.0
    finally:
        process.kill()
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()
    left = [item.name for item in folder.iterdir() if item.name.startswith(".")]
    yield (f"left {left}" if len(left) > 1 else ""), 0.0
