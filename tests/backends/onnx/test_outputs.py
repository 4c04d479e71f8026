"""Outputs that are another output, an input or a parameter, and outputs named like inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError
from bmgraph.ir.tensor_spec import TensorSpec, graph_output_names

Outputs = Callable[["Layer", torch.Tensor, torch.Tensor], object]


class Layer(nn.Module):
    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear, self.outputs = nn.Embedding(9, 4), nn.Linear(4, 4), outputs

    def forward(self, ids: torch.Tensor) -> object:
        return self.outputs(self, ids, self.linear(self.embedding(ids)))


CASES: dict[str, Outputs] = {
    "the same value": lambda model, ids, y: {
        "last": y, "hidden": (y.relu(), y), "ids": ids, "same": ids + 0, "weight": model.linear.weight,
    },
    "the same name": lambda model, ids, y: {"ids": y, "a.b": y.relu(), "a": {"b": y.abs()}},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_outputs_of_an_engine(case: str, tmp_path: Path) -> None:
    model = Layer(CASES[case]).eval()
    engine = bg.compile(model, passes=[], example={"ids": torch.arange(6).reshape(2, 3)}, backend="onnx")
    engine.save(tmp_path / "engine")
    batch = torch.tensor([[8, 0, 1, 1], [2, 7, 5, 3], [4, 4, 4, 4]])
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(batch))
    for ready in (engine, bg.load(tmp_path / "engine")):
        found = ready(ids=batch)
        assert list(found) == [spec.name for spec in engine.outputs]
        torch.testing.assert_close(list(found.values()), expected)


def test_a_forward_without_outputs_is_refused() -> None:
    with pytest.raises(CaptureError, match="forward returns no tensor"):
        bg.capture(Layer(lambda model, ids, y: None), {"ids": torch.arange(6).reshape(2, 3)})


def test_names_in_a_graph_differ() -> None:
    specs = [TensorSpec(name, torch.float32, ()) for name in ("x", "output.x", "y")]
    assert graph_output_names(specs[:1], specs) == ["output.x", "output.output.x", "y"]
