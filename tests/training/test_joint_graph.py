"""The joint graph: what autograd computes, traced once for each kind of call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.training import joint_assembly
from bmgraph.training.executor import Runner
from bmgraph.training.joint_graph import trace_step


class Layers(nn.Module):
    """Residual layers, whose inputs each have gradients of several readers, with one tied weight."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(count))
        self.norms = nn.ModuleList(nn.RMSNorm(6) for _ in range(count))
        self.head = nn.Linear(6, 6)
        self.head.weight = self.layers[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip(self.layers, self.norms):
            h = norm(x)
            one, other = layer(h).chunk(2, -1)
            x = x + h * torch.cat([torch.sigmoid(one) * one, other * other], -1)
        return self.head(x).square().sum()


class Selected(nn.Module):
    """A mask selects rows, so that sizes depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        above, below = h[h[:, 0] > 0], h[h[:, 0] <= 0]
        return self.second(above).square().sum() / above.shape[0] + self.second(below).sum() * below.shape[0]


class Shared(nn.Module):
    """A value is read as it is and through calls, by products of one kind: the gradients that meet are alike but for values."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6))
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = self.gain * 2.0
        h = self.first(x) * gain + self.second(x) * (gain - 1)
        turned = h.reshape(-1, 6)
        return (self.third(h) + self.third(turned + 1).view_as(h) + (h * gain).neg()).square().sum()


def stepped(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    step = trace_step(bg.capture(model, (x,), prove=False), "output")
    output = Runner(step).run({"x": x})
    assert output.count == 1
    return output.gradients


@pytest.mark.parametrize("model", [Layers(3), Selected(), Shared()], ids=["layers", "selected", "shared"])
def test_gradients_are_those_of_autograd(model: nn.Module) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    found = stepped(model, x)
    model.zero_grad()
    model(x).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        torch.testing.assert_close(found[name], gradient, rtol=2e-6, atol=1e-5)


def test_layers_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []
    trace = joint_assembly.trace_call
    monkeypatch.setattr(joint_assembly, "trace_call", lambda *given: traced.append(given) or trace(*given))
    counts = []
    for layers in (3, 6):
        stepped(Layers(layers), torch.randn(8, 6))
        counts.append(len(traced))
        traced.clear()
    assert counts[0] == counts[1]
