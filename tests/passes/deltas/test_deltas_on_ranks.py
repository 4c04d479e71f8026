"""Each family beside int8 weights under ZeRO 3 on two ranks: losses of a plain PyTorch loop; then on an ONNX engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import (
    IA3,
    Adapter,
    BitFit,
    Compacter,
    DoRA,
    LoRA,
    LowRankAdapter,
    ParallelAdapter,
    Prefix,
    Quantize,
    SoftTokens,
    VeRA,
    ZeRO,
)
from bmgraph.verify.metrics import relative_error
from tests.helpers.ranks import run_ranks
from tests.helpers.training import batches, captured_to_train

FAMILIES: tuple[ModelPass, ...] = (
    LoRA(r=2, rslora=True, bias="all"), DoRA(r=2), IA3(), BitFit(add=True), VeRA(r=4), Adapter(4), ParallelAdapter(4),
    LowRankAdapter(8), Compacter(8), Prefix(3), Prefix(3, projection=True, hidden=8), SoftTokens((3, None)),
)  # fmt: skip

STEPS, RATE = 4, 1e-2

GROUPS = (FAMILIES[:3], FAMILIES[3:6], FAMILIES[6:])
CASES = [
    *((name, group) for name in ("gpt2", "llama") for group in GROUPS),
    ("t5", GROUPS[0]),
    ("bert", GROUPS[2]),
]


def _train(rank: int, folders: list[str], name: str) -> list[list[float]]:
    """The losses of each saved program, trained; rank 0 saves what was trained."""
    found = []
    for folder in folders:
        backend = Torch(optimizer=AdamW(lr=RATE, weight_decay=0.0))
        trainer: Any = bg.compile(bg.load(folder), [ZeRO(3)], backend=backend)
        found.append([trainer.step(batch).loss for batch in batches(name, STEPS)])
        program = trainer.program()
        if rank == 0:
            program.save(f"{folder}-trained")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "families"), CASES)
def test_each_family_under_zero_and_on_an_engine(
    name: str, families: tuple[ModelPass, ...], tmp_path: Path
) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(captured_to_train(name))
    programs = [bg.Pipeline([item]).run(codes) for item in families]
    folders = [str(tmp_path / f"{index}-{item.name}") for index, item in enumerate(families)]
    for program, folder in zip(programs, folders):
        program.save(folder)
    one, two = run_ranks(2, _train, folders, name)
    assert one == two
    for item, program, folder, losses in zip(families, programs, folders, one):
        assert losses == pytest.approx(_plain(program, name), abs=1e-5), item.name
        trained = bg.load(f"{folder}-trained")
        engine: Any = bg.compile(trained, backend="onnx")
        batch = batches(name, 1)[0]
        found = engine(**{spec.name: batch[spec.name] for spec in engine.inputs})["logits"]
        expected = trained(**{spec.name: batch[spec.name] for spec in trained.inputs})["logits"]
        assert relative_error(torch.as_tensor(found), expected) < 1e-4, item.name


def _plain(program: bg.Program, name: str) -> list[float]:
    """The losses of the program as a module, in a plain loop in one process."""
    program = program.clone()  # which shares storage with the others, and the optimizer writes in place
    program.parameters |= {
        key: value.clone() for key, value in program.parameters.items() if key not in program.frozen
    }
    module = program.module(training=True)
    chosen = [item for key, item in module.named_parameters() if key not in program.frozen]
    rule = torch.optim.AdamW([item.requires_grad_() for item in chosen], lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches(name, STEPS):
        rule.zero_grad()
        values = module(*(batch[spec.name] for spec in program.inputs))
        loss = dict(zip((spec.name for spec in program.outputs), values))["loss"]
        loss.backward()
        rule.step()
        losses.append(loss.item())
    return losses
