"""Rows choose among deltas of every family that stacks them: each row is what its delta alone gives, on torch and on an engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    Deltas,
    DoRA,
    LoadDelta,
    LoRA,
    LowRankAdapter,
    ParallelAdapter,
    Quantize,
    VeRA,
)
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.peft_models import EXACT
from tests.helpers.sweep import sweep

NAMES = ("one", "two")
ROWS = ["two", None, "one", "two"]

PAIRS: dict[str, tuple[ModelPass, ModelPass]] = {
    "ia3": (IA3(targets=("0", "2"), feedforward_modules=("2",)), IA3(targets=("2",), feedforward_modules=("2",))),
    "bitfit": (BitFit(add=True, targets=("0", "2")), BitFit(add=True, targets=("2",))),
    "adapter": (Adapter(3, targets=("0", "2"), scale=0.5), Adapter(2, targets=("2",))),
    "parallel_adapter": (ParallelAdapter(3, targets=("2",)), ParallelAdapter(2, targets=("2",), scale=2.0)),
    "low_rank_adapter": (LowRankAdapter(4, 2, targets=("2",)), LowRankAdapter(6, 1, targets=("0", "2"))),
    "compacter": (Compacter(4, 2, targets=("2",)), Compacter(8, 2, targets=("0", "2"))),
    "vera": (VeRA(3, targets=("0", "2")), VeRA(3, targets=("0", "2"), d_initial=0.3)),
}  # fmt: skip


@cache
def feedforward(dims: int) -> Program:
    """Two linears without biases and an activation, on rows [batch, 8], or [batch, sequence, 8]."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 8, bias=False))
    return bg.capture(model, {"input": torch.randn(*((4, 8) if dims == 2 else (4, 5, 8)))})


def saved(program: Program, pair: tuple[ModelPass, ModelPass], folder: Path) -> dict[str, str]:
    """Folders of two deltas with random values."""
    for seed, (name, item) in enumerate(zip(NAMES, pair)):
        trained(bg.Pipeline([item]).run(program), seed=seed, size=0.5).save_delta(str(folder / name))
    return {name: str(folder / name) for name in NAMES}


def by_rows(program: Program, folders: dict[str, str], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Each row by the program with its delta alone."""
    alone = {
        name: bg.Pipeline([LoadDelta(name)]).run(program, resources=folders)(**batch)["output"]
        for name in NAMES
    }
    plain = program(**batch)["output"]
    return torch.stack([(plain if name is None else alone[name])[row] for row, name in enumerate(ROWS)])


EACH = tuple((family, dims) for family in PAIRS for dims in (2, 3))


@pytest.mark.parametrize(
    ("family", "dims"), sweep(EACH, (("ia3", 2), ("adapter", 2), ("parallel_adapter", 3), ("vera", 3)))
)
def test_each_row_is_what_its_delta_gives(family: str, dims: int, tmp_path: Path) -> None:
    program = feedforward(dims)
    folders = saved(program, PAIRS[family], tmp_path)
    both = bg.Pipeline([Deltas(NAMES)]).run(program, resources=folders)
    batch = {"input": torch.randn(program.example["input"].shape)}
    expected = by_rows(program, folders, batch)
    found = both(**batch, delta=ROWS)["output"]
    assert relative_error(found, expected) < EXACT
    assert relative_error(found[[1]], expected[[0]]) > 0.01  # deltas are large
    assert torch.equal(both(**batch)["output"], program(**batch)["output"])


@pytest.mark.parametrize("family", sweep(tuple(PAIRS), ("ia3",)))
def test_rows_choose_on_an_engine_of_int8_weights(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    program = feedforward(3)
    folders = saved(program, PAIRS[family], tmp_path)
    small = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    engine = bg.compile(small, [Deltas(NAMES)], backend="onnx", resources=folders)
    batch = {"input": torch.randn(4, 7, 8)}
    expected = by_rows(small, folders, batch)
    assert relative_error(engine(**batch, delta=ROWS)["output"], expected) < 1e-4


def test_deltas_that_rows_cannot_choose_are_refused(tmp_path: Path) -> None:
    program = feedforward(3)
    for count, (first, second, message) in enumerate((
        (VeRA(3, targets=("2",)), VeRA(3, targets=("2",), seed=1), "'one' and 'two' have different matrices 'a'"),
        (Adapter(2, targets=("2",)), Adapter(2, targets=("2",), activation="relu"), "activation='gelu' and 'relu'"),
        (IA3(targets=("2",)), IA3(targets=("2",), feedforward_modules=("0",)), "some scale its inputs and others its outputs"),
        (LoRA(2, targets=("2",)), DoRA(2, targets=("2",)), "'two' in .* is of the family 'dora', of which rows cannot choose"),
    )):  # fmt: skip
        folders = saved(program, (first, second), tmp_path / str(count))
        with pytest.raises(PassError, match=message):
            bg.Pipeline([Deltas(NAMES)]).run(program, resources=folders)
