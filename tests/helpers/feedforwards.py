"""Feed-forward models of every kind, and helpers for tests of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import bmgraph as bg
from bmgraph.analysis.interpreter import Observed, evaluate
from bmgraph.ir.program import Program
from bmgraph.passes import MoEfy

WIDTH, NEURON_COUNT = 32, 64


class FeedForward(nn.Module):
    """Plain or gated; `kind` "fused": gate and up are one linear, "stored": weights are stored [in, out]."""

    def __init__(self, kind: str = "plain", activation: str = "relu", neurons: int = NEURON_COUNT) -> None:
        super().__init__()
        self.kind, self.activation = kind, getattr(nn.functional, activation)
        self.up = nn.Linear(WIDTH, 2 * neurons if kind == "fused" else neurons)
        self.gate = nn.Linear(WIDTH, neurons, bias=False) if kind == "gated" else None
        self.down = nn.Linear(neurons, WIDTH, bias=kind != "gated")
        self.drop = nn.Dropout(0.1)
        if kind == "stored":
            self.up.weight = nn.Parameter(self.up.weight.detach().T.contiguous())
            self.down.weight = nn.Parameter(self.down.weight.detach().T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "stored":
            hidden = self.activation(torch.addmm(self.up.bias, x.reshape(-1, WIDTH), self.up.weight))
            made = torch.addmm(self.down.bias, self.drop(hidden), self.down.weight)
            return x + made.reshape(x.shape)
        if self.kind == "fused":
            gate, up = self.up(x).chunk(2, -1)
            hidden = self.activation(gate) * up
        elif self.gate is not None:
            hidden = self.activation(self.gate(x)) * self.up(x)
        else:
            hidden = self.activation(self.up(x))
        return x + self.down(self.drop(hidden))


KINDS = (("plain", "relu"), ("plain", "gelu"), ("gated", "silu"), ("fused", "silu"), ("stored", "gelu"))


def inputs(batch: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Tokens from a few clusters, so that a router has something to learn."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(99))
    kinds = torch.randint(0, 6, (batch, length), generator=generator)
    return centres[kinds] + 0.5 * torch.randn(batch, length, WIDTH, generator=generator)


def calibration(count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Calibration batches of such tokens."""
    return [{"x": inputs(8, 9, seed)} for seed in range(1, count + 1)]


def captured_feedforward(kind: str = "plain", activation: str = "relu", **options: int) -> Program:
    """A captured feed-forward with a residual; always the same weights."""
    torch.manual_seed(0)
    return bg.capture(FeedForward(kind, activation, **options), {"x": inputs()})


def moefied(
    program: Program,
    experts: int = 8,
    active: int | tuple[tuple[str, int], ...] = 2,
    **options: str | int | float,
) -> Program:
    """The program after MoEfy, calibrated on `calibration()`."""
    item = MoEfy(experts, active, **options)  # type: ignore[arg-type]
    return bg.Pipeline([item]).run(program, calibration=calibration())


def experts_products(program: Program) -> list[fx.Node]:
    """The expert product nodes, in graph order."""
    return [node for node in program.graph.nodes if node.target is torch.ops.bmgraph.experts_linear.default]


def naive_sum(
    program: Program, x: torch.Tensor, ids: torch.Tensor, kind: str, activation: str
) -> torch.Tensor:
    """x + the sum over the experts `ids` i64[T, K] of a MoEfied FeedForward, each computed by plain products."""
    weights = {
        str(node.meta["site"]).split(".")[0]: evaluate(program, node.args[1])  # type: ignore[arg-type]
        for node in experts_products(program)
    }
    bias = program.parameters.get("up.bias")
    function = getattr(nn.functional, activation)
    rows, made = x.reshape(-1, WIDTH), []
    for row, chosen in zip(rows, ids.reshape(len(rows), -1).tolist()):
        total = row.clone()
        for expert in chosen:
            up = weights["up"][expert] @ row + (0 if bias is None else bias[expert])
            if kind == "fused":
                gate, up = up.chunk(2)
                hidden = function(gate) * up
            elif kind == "gated":
                hidden = function(weights["gate"][expert] @ row) * up
            else:
                hidden = function(up)
            total = total + weights["down"][expert] @ hidden
        made.append(total + program.parameters["down.bias"] if "down.bias" in program.parameters else total)
    return torch.stack(made).reshape(x.shape)


def chosen_ids(program: Program, x: torch.Tensor) -> torch.Tensor:
    """The experts that a MoEfied program chooses, i64[T, K]."""
    node: Any = experts_products(program)[0].args[2]
    found: list[torch.Tensor] = []
    Observed(program).run({"x": x}, {node.name}, lambda _, value: found.append(value))
    return found[0].reshape(-1, found[0].shape[-1])
