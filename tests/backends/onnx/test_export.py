"""What cannot be translated is told in one line that names the operator of the model and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx import export
from bmgraph.errors import BackendError


class Applied(nn.Module):
    """Applies a function to a linear's output."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x: torch.cdist(x, x), r"aten\.cdist"), (lambda x: torch.erfinv(x.tanh()), r"aten\.erfinv")],
    ids=["cdist", "erfinv"],
)
def test_an_operator_is_named_also_where_its_parts_fail(
    function: Callable[[torch.Tensor], torch.Tensor], name: str
) -> None:
    with pytest.raises(BackendError, match=rf"operator {name}.*test_export\.py:\d+.*replace it in the model"):
        bg.compile(Applied(function), example=(torch.randn(3, 4),), backend="onnx")


def test_a_failed_optimiser_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError("of two\nlines")

    monkeypatch.setattr(export, "simplify", fails)
    with pytest.raises(BackendError, match=r"onnxscript \S+ failed .*\(ZeroDivisionError: of two\): install"):
        bg.compile(Applied(torch.relu), example=(torch.randn(3, 4),), backend="onnx")
