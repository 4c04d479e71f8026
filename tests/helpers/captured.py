"""Zoo models and their programs, captured once per process, and the comparison with eager."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program
from tests.helpers.zoo import BY_NAME, ZOO, Arch, Batch

TOLERANCE = 1e-4
"""Largest relative L2 distance to eager, at float32."""

NAMES = [arch.name for arch in ZOO]


@cache
def captured(name: str) -> tuple[nn.Module, Program]:
    """A zoo model and its program; captured once per process."""
    arch = BY_NAME[name]
    model = arch.build()
    return model, bg.capture(model, arch.example(2, arch.lengths[0]))


def batches(arch: Arch) -> list[Batch]:
    """Batches of two sizes; two batches of one size where the length is fixed."""
    return [arch.example(2, arch.lengths[0]), arch.example(3, arch.lengths[1])]


def eager_outputs(model: nn.Module, batch: Batch, names: list[str]) -> dict[str, torch.Tensor]:
    """The outputs of a model under the names that its program gives them."""
    found = model(**batch)
    outputs = {}
    for name in names:
        value: Any = found
        for step in name.split("."):
            value = value[int(step)] if step.isdigit() else value[step]
        outputs[name] = value
    return outputs


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance of a to b."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
