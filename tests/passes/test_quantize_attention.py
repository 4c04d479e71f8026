"""Rounded queries and keys: against a naive formula, where they are declined or refused, and histories of a former target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import bmgraph as bg
from bmgraph.backends import OpenVINO
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.passes import Quantize

OLD = Target("openvino", ("static",))
TARGET = Target("openvino", ("static",), attention=True, former=(OLD,))


class Attends(nn.Module):
    """Two heads of eight; it returns its projections too."""

    def __init__(self, peak: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        with torch.no_grad():
            self.q.weight[0] *= peak

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        found = {"q": self.q(x), "k": self.k(x), "v": self.v(x)}
        return {**found, "attended": attended(**found)}


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = (item.unflatten(-1, (2, 8)).transpose(1, 2) for item in (q, k, v))
    return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def quantized(peak: float = 1.0, target: Target = TARGET, **options: object) -> Program:
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(3))
    program = bg.capture(Attends(peak).eval(), {"x": x})
    item = Quantize(smallest=8, outliers=False, **options)  # type: ignore[arg-type]
    return bg.Pipeline([item]).run(program, calibration=[program.example], target=target)


def test_queries_and_keys_are_rounded_to_s8() -> None:
    found, plain = quantized(), quantized(attention=False)
    values = {name: value for name, value in plain(**plain.example).items() if name != "attended"}
    ranges = {
        name: float(value.abs().max())
        for name, value in bg.capture(Attends().eval(), plain.example)(**plain.example).items()
    }
    for name in ("q", "k"):
        scale = ranges[name] / 127
        values[name] = (values[name] / scale).round().clamp(-128, 127) * scale
    output = found(**found.example)
    torch.testing.assert_close(output["attended"], attended(**values), atol=2e-6, rtol=0)
    assert torch.equal(output["q"], plain(**plain.example)["q"])
    assert not torch.equal(output["attended"], plain(**plain.example)["attended"])
    edit = next(edit for edit in found.history[-1].edits if "queries" in edit.what)
    assert (edit.site, edit.tensors) == ("q.weight", ("k.weight",))


def test_an_attention_that_rounding_moves_too_far_is_declined() -> None:
    record = quantized(peak=40.0, site_drift=0.012).history[-1]
    assert [edit.site for edit in record.declined] == ["q.weight"]
    assert "queries and keys of its attention would change by 0.0" in record.declined[0].what
    assert len(record.edits) == 3


def test_an_attention_whose_projections_stay_is_left_alone() -> None:
    found = quantized(exclude=("k.weight",))
    assert not [edit for edit in found.history[-1].edits if "queries" in edit.what]


def test_a_target_without_the_kernel_refuses_it() -> None:
    with pytest.raises(PassError, match="torch multiplies no rounded queries"):
        quantized(target=TORCH, attention=True)
    modes = Target("both", ("static", "none"), attention=True)
    with pytest.raises(PassError, match="attention=True with none activations"):
        quantized(target=modes, attention=True, activations="none")


def test_a_history_keeps_the_target_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    for version, text in (("1", "openvino"), ("2", "openvino@2")):
        target = OpenVINO.target.at(version)
        assert target.attention == (version == "2")
        done = quantized(target=target)
        assert done.history[-1].target == text
        done.save(tmp_path / version)
        again = bg.replay(tmp_path / version, Attends().eval(), calibration=[done.example])
        assert [record.target for record in again.history] == [record.target for record in done.history]
    with pytest.raises(InputError, match="'openvino' has no version '9': this bmgraph knows 1 to 2"):
        TARGET.at("9")
