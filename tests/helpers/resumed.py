"""Runs of passes that are stopped after some of their work was kept, as a killed process leaves it, and go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

import bmgraph as bg
from bmgraph.api import Pass, Program
from bmgraph.pass_manager import resume_folder

Run = Callable[[Path | None], Program]
"""Runs passes on a program, with a folder to go on in or without one."""


class Stopped(BaseException):
    """Ends a run as a signal would: nothing handles it."""


@contextmanager
def stopping(after: int) -> Iterator[list[str]]:
    """Stop once `after` files were kept; gives the names of those that were."""
    kept: list[str] = []
    write = resume_folder.write_values

    def counted(file: Path, value: object) -> int:
        if len(kept) == after:
            raise Stopped
        size = write(file, value)
        kept.append(file.name)
        return size

    with patch.object(resume_folder, "write_values", counted):
        yield kept


def is_stopped(run: Run, folder: Path, after: int) -> bool:
    """Whether a run was stopped after it had kept so many files."""
    try:
        with stopping(after):
            run(folder)
    except Stopped:
        return True
    return False


def assert_same(one: Program, other: Program) -> None:
    """Two programs are bit-equal: graphs, tensors, and what their history says."""
    assert str(one) == str(other)
    mine, theirs = one.tensors(), other.tensors()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8) if tensor.dim() else tensor, theirs[name].view(torch.uint8) if tensor.dim() else theirs[name]), name  # fmt: skip
    assert [replace(record, machine={}) for record in one.history] == [
        replace(record, machine={}) for record in other.history
    ]
    for field in ("ties", "frozen", "trained_whole", "lr_factors", "step_rules", "fingerprint", "training"):
        assert getattr(one, field) == getattr(other, field), field
    assert {name: item.inputs for name, item in one.signatures.items()} == {
        name: item.inputs for name, item in other.signatures.items()
    }


class TwoLayers(nn.Module):
    """Two residual feed-forwards."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32), "norm": nn.LayerNorm(32)}) for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.relu(layer["up"](layer["norm"](x))))  # type: ignore[index]
        result: torch.Tensor = self.head(x)
        return result


@cache
def two_layers() -> Program:
    """The program of two layers, captured once per process."""
    return bg.capture(TwoLayers(), two_layers_batches(1)[0])


def two_layers_batches(count: int = 3, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Batches for it."""
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(4 + number, 32, generator=generator)} for number in range(count)]


def run_and_save(folder: Path, out: Path, passes: Sequence[Pass], hold_after: int | None) -> None:
    """What a process that is killed runs: passes on two layers, whose program it saves; it waits once it has kept so many files."""
    torch.set_num_threads(1)

    def held(
        file: Path, value: object, write: Callable[[Path, object], int] = resume_folder.write_values
    ) -> int:
        size = write(file, value)
        kept.append(file.name)
        if len(kept) == hold_after:
            (folder / "held").touch()
            time.sleep(600)
        return size

    kept: list[str] = []
    program = two_layers()
    (out.parent / "started").touch()
    with patch.object(resume_folder, "write_values", held):
        done = bg.Pipeline(passes).run(
            program, calibration=two_layers_batches(), max_drift=9.0, resume=folder
        )
    done.save(str(out))
