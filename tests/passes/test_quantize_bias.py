"""Bias correction against means that are computed by running both models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, VerificationError
from bmgraph.passes import Quantize
from bmgraph.passes.quantize.quantize import Quantize as Kind
from bmgraph.verify.measures import WeightsMoved


class Two(nn.Module):
    """Linears stored both ways, one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.plain = (
            nn.Linear(24, 32),
            nn.Linear(32, 16),
            nn.Linear(32, 16, bias=False),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x).relu()
        return self.second(h) + self.plain(h)


@pytest.mark.parametrize("activations", ["none", "static"])
def test_the_means_of_outputs_are_those_of_float_weights(activations: str) -> None:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(n, 24) + 2} for n in (40, 24)]
    program = bg.capture(Two(), batches[0])
    item = Quantize("int8", activations=activations, method="mse", outliers=False, correct_bias=True)
    done = bg.Pipeline([item]).run(program, calibration=batches)
    said = {edit.site: edit.what for edit in done.history[-1].edits}
    assert said["first.weight"].endswith(", bias corrected")
    assert not said["plain.weight"].endswith("corrected")
    x = torch.cat([batch["x"] for batch in batches])
    weight, bias = program.parameters["first.weight"], program.parameters["first.bias"]
    near = done.parameters["first.weight_codes"] * done.parameters["first.weight_scale"][:, None]
    rounded = x
    if activations == "static":
        scale, zero = (done.parameters[f"first.weight_input_{name}"] for name in ("scale", "zero"))
        rounded = torch.ops.bmgraph.quantize_static(x, scale, zero)
    expected = bias + (x @ weight.T).mean(0) - (rounded @ near.T).mean(0)
    torch.testing.assert_close(done.parameters["first.bias"], expected, rtol=1e-5, atol=1e-6)
    outputs = (rounded @ near.T + done.parameters["first.bias"]).mean(0)
    torch.testing.assert_close(outputs, (x @ weight.T + bias).mean(0), rtol=1e-5, atol=1e-5)


def test_biases_change_only_where_the_pass_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"x": torch.randn(40, 24) + 2}
    program = bg.capture(Two(), batch)
    item = Quantize("int4", activations="none", correct_bias=True)
    bg.Pipeline([item]).run(program, calibration=[batch])
    with pytest.raises(InputError, match="gptq fits outputs with their means already"):
        Quantize("int4", method="gptq", correct_bias=True)
    monkeypatch.setattr(Kind, "measured", property(lambda self: WeightsMoved(0.5)))
    with pytest.raises(VerificationError, match="the pass changed more than weights and roundings"):
        bg.Pipeline([item]).run(program, calibration=[batch])
