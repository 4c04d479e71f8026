"""ZeRO on real gloo ranks: the losses of one plain process, no rank with more of the model than its share and a layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import InputError
from bmgraph.passes import LoRA, Quantize, ZeRO
from bmgraph.program import Program
from bmgraph.ranks import Ranks
from bmgraph.runtime.trainer import Trainer
from bmgraph.step.layout import Flat
from bmgraph.step.pipeline import run_step_passes
from bmgraph.step.trace import trace_step
from bmgraph.step.units import units
from tests.live import LiveParameters
from tests.ranks import run_ranks
from tests.training import batches, toy

STEPS = 20
RATE = 1e-2


def adapted(name: str) -> Program:
    """A LoRA on an int8 weight-only toy."""
    program = bg.capture(toy(name), batches(name, 1)[0])
    return bg.Pipeline([Quantize("int8", activations="none"), LoRA(r=4, targets=("*",))]).run(program)


def trainer_of(program: Program) -> Trainer:
    trainer: Trainer = bg.compile(
        program, passes=[ZeRO(3)], backend=Torch(optimizer=AdamW(lr=RATE), clip_norm=1.0)
    )
    return trainer


@dataclass
class Naive:
    """A plain eager form of a program: its graph run with autograd, every weight whole."""

    program: Program

    def losses(self, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        """Of STEPS steps over the whole batches, and the parameters after them."""
        module = self.program.module(training=True)
        trained = {key: item for key, item in module.named_parameters() if item.requires_grad}
        rule = torch.optim.AdamW(trained.values(), lr=RATE)
        found = []
        for batch in batches(name, STEPS):
            rule.zero_grad()
            loss = module(*(batch[spec.name] for spec in self.program.inputs))[0]
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            rule.step()
            found.append(loss.item())
        return found, {key: item.detach() for key, item in trained.items()}


def _train(rank: int, saved: str, name: str, resumed: str = "") -> dict[str, Any]:
    """What the tests look at, from one rank that trains on its rows for STEPS steps."""
    trainer = trainer_of(bg.load(saved))
    given = batches(name, STEPS)
    half = STEPS // 2
    held = list(trainer.state.tensors.values())
    parameters = [t for key, t in trainer.state.tensors.items() if key in trainer.state.layouts]
    losses = [trainer.step(batch).loss for batch in given[:half]]
    trainer.save(f"{saved}-at-{half}")
    with LiveParameters(parameters) as live:
        losses.append(trainer.step(given[half]).loss)
    losses += [trainer.step(batch).loss for batch in given[half + 1 :]]
    calls = [node for node in trainer.state.graph.nodes if node.op == "call_function"]
    reduced = [node for node in calls if "reduce_scatter" in str(node.target)]
    return {
        "losses": losses,
        "most": live.most,
        "dequantised": live.most_dequantised,
        "gathered": live.gathered,
        "held": sum(tensor.nbytes for tensor in parameters),
        "dtypes": {key: str(item.dtype) for key, item in trainer.state.layouts.items()},
        "reduced": sum(node.meta["val"].numel() for node in reduced),
        "trained": sum(trainer.state.layouts[key].share for key in trainer.state.trained),
        "parameters": trainer.program().parameters,
        "all": len(held),
    }
