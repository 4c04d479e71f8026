"""Methods of a model become graphs of one program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.capture_methods import capture_methods


class Model(nn.Module):
    """Two methods that share `one`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 2)

    def encode(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"memory": self.one(x)}

    def forward(self, memory: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.other(memory + self.one(y))}


def test_methods_share_weights() -> None:
    model = Model()
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    memory = model.encode(x)["memory"].detach()
    program = capture_methods(model, {"encode": {"x": x}, "forward": {"memory": memory, "y": y}})
    assert list(program.graphs) == ["forward", "encode"]
    assert set(program.parameters) == {"one.weight", "one.bias", "other.weight", "other.bias"}
    assert "forward" not in model.__dict__
    x, y = torch.randn(7, 4), torch.randn(7, 4)
    wanted = model(**model.encode(x), y=y)["scores"]
    assert torch.allclose(program(x=x, y=y)["scores"], wanted, atol=1e-6)
    assert torch.allclose(program.at("encode")(x=x)["memory"], model.encode(x)["memory"], atol=1e-6)


def test_what_it_cannot_take_is_said() -> None:
    given = {"memory": torch.randn(5, 4), "y": torch.randn(5, 4)}
    with pytest.raises(
        CaptureError, match="the model has no method 'decode': give an example of each method"
    ):
        capture_methods(Model(), {"forward": given, "decode": given})
    with pytest.raises(CaptureError, match="no example of 'forward' is given"):
        capture_methods(Model(), {"encode": {"x": torch.randn(5, 4)}})
    with pytest.raises(CaptureError, match=r"do not fit each other: graph 'forward' takes memory: f32\["):
        capture_methods(Model(), {"forward": given, "encode": {"x": torch.randn(5, 3, 4)}})
