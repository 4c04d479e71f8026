"""Codes of 2, 3 and mixed bits: what is stored, what each target refuses, bits by a budget, replay without a search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.target import Target
from bmgraph.passes import LoRA, Merge, Quantize
from bmgraph.passes.quantize.quantize import Quantize as Kind
from bmgraph.passes.spend_budget import spent
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import trained
from tests.helpers.models import tokens

ONNX = Target("onnx", ("blocks", "none"), weight_scales=("channel", "block"))

ONNX_2 = replace(ONNX, block_bits=(2, 4, 8))

CALIBRATION = [tokens(4, 12, seed) for seed in range(2)]


@pytest.mark.parametrize("bits", [2, 3])
def test_few_bits_are_stored_packed_and_run_on_torch(program: Program, bits: int, tmp_path: Path) -> None:
    item = Quantize(f"int{bits}", group=16, site_drift=2.0)
    done = bg.Pipeline([item]).run(program, max_drift=2.0)
    codes = done.parameters["blocks.0.up.weight_codes"]
    assert codes.numel() * 8 == bits * program.parameters["blocks.0.up.weight"].numel()
    done.save(tmp_path / "saved")
    batch = tokens(2, 7)
    assert torch.equal(bg.load(tmp_path / "saved")(**batch)["logits"], done(**batch)["logits"])
    with pytest.raises(
        PassError, match=f"onnx has no kernel for codes of {bits} bits: choose codes of 4 or 8 bits"
    ):
        bg.Pipeline([item]).run(program, target=ONNX)


def test_codes_of_two_bits_go_to_an_engine() -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 32)}
    program = bg.capture(Uneven(), batch)
    item = Quantize("int2", method="gptq", site_drift=2.0)
    engine = bg.compile(program, [item], backend="onnx", calibration=[batch], max_drift=2.0)
    done = bg.Pipeline([item]).run(program, calibration=[batch], max_drift=2.0, target=ONNX_2)
    assert relative_error(engine(**batch)["output"], done(**batch)["output"]) < 1e-4
    with pytest.raises(
        PassError, match="onnx has no kernel for codes of 3 bits: choose codes of 2 or 4 or 8 bits"
    ):
        bg.compile(program, [Quantize("int3")], backend="onnx")


def test_steps_are_taken_by_what_they_save() -> None:
    drifts = {"a": {4: 9.0, 8: 1.0}, "b": {4: 4.0, 8: 0.0}, "c": {4: 50.0, 8: 0.0}, "d": {4: 0.0, 8: 0.0}}
    sizes = {"a": 10, "b": 4, "c": 100, "d": 1}
    assert spent(drifts, sizes, [4, 8], 4.5) == {"a": 8, "b": 8, "c": 4, "d": 4}  # c does not fit
    assert spent(drifts, sizes, [4, 8], 8) == {"a": 8, "b": 8, "c": 8, "d": 4}  # d gains nothing
    assert set(spent(drifts, sizes, [4, 8], 4).values()) == {4}


class Uneven(nn.Module):
    """Linears of one size, of which the third adds most to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(8))
        with torch.no_grad():
            self.parts[2].weight.mul_(20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)


def test_a_budget_goes_where_outputs_drift_and_replay_does_not_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(16, 32)}
    program = bg.capture(Uneven(), batch)
    item = Quantize("mixed", average=4.5, method="mse")
    done = bg.Pipeline([item]).run(program, calibration=[batch], max_drift=1.0)
    said = {edit.site: edit.what for edit in done.history[-1].edits}
    assert said["parts.2.weight"] == "int8 weight by mse"
    assert sum(what.startswith("int8") for what in said.values()) == 1
    assert "bits=[[parts.0.weight,4]" in done.history[-1].text
    plain = bg.Pipeline([Quantize("int4", method="mse")]).run(program, max_drift=1.0)
    errors = [relative_error(one(**batch)["output"], program(**batch)["output"]) for one in (done, plain)]
    assert errors[0] < 0.4 * errors[1]
    done.save(tmp_path / "saved")
    monkeypatch.setattr("bmgraph.passes.quantize.quantize.choose_bits", None)  # a replay must not search
    again = bg.replay(tmp_path / "saved", program, calibration=[batch])
    assert all(torch.equal(again.parameters[name], value) for name, value in done.parameters.items())
    one_wrong = Kind("mixed", average=4.5, bits=(("parts.0.weight", 4),))
    with pytest.raises(PassError, match=r"bits= says nothing of parts.1.weight"):
        bg.Pipeline([one_wrong]).run(program, max_drift=1.0)


def test_mixed_codes_are_calibrated_and_go_to_an_engine() -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    batch = {"x": torch.randn(64, 32)}
    program = bg.capture(Uneven(), batch)
    item = Quantize("mixed", average=5.0, method="gptq")
    engine = bg.compile(program, [item], backend="onnx", calibration=[batch], max_drift=1.0)
    done = bg.Pipeline([item]).run(program, calibration=[batch], max_drift=1.0, target=ONNX)
    sizes = [value.shape[-1] // 4 for name, value in done.parameters.items() if name.endswith("_codes")]
    assert sorted(sizes) == [4] * 6 + [8] * 2
    assert relative_error(engine(**batch)["output"], done(**batch)["output"]) < 1e-3


def test_budgets_that_cannot_be_met_name_the_nearest(program: Program) -> None:
    with pytest.raises(
        InputError,
        match=r"average=1.5 cannot be met: codes have 2 or 3 or 4 or 8 bits; the nearest is average=2",
    ):
        Quantize("mixed", average=1.5)
    with pytest.raises(InputError, match=r"the nearest is average=8"):
        Quantize("mixed", average=12)
    with pytest.raises(
        PassError,
        match=r"average=3.5 cannot be met: onnx has codes of 4 and 8 bits; the nearest is average=4",
    ):
        bg.Pipeline([Quantize("mixed", average=3.5)]).run(program, calibration=CALIBRATION, target=ONNX)
    with pytest.raises(InputError, match="needs a budget"):
        Quantize("mixed")
    with pytest.raises(InputError, match="are those of scheme='mixed', not of 'int4'"):
        Quantize("int4", average=4.5)
    with pytest.raises(ResourceError, match="calibration"):
        bg.Pipeline([Quantize("mixed", average=4.5)]).run(program)
    with pytest.raises(InputError, match="none of our targets has a kernel"):
        Quantize("nf4")
    with pytest.raises(
        PassError, match=r"torch has no kernel for fp8: its product on the CPU.*int8, which takes as many"
    ):
        bg.Pipeline([Quantize("fp8")]).run(program)


def test_deltas_sit_on_codes_of_three_bits_and_are_merged_within_a_stated_error() -> None:
    torch.manual_seed(0)
    program = bg.capture(Uneven(), {"x": torch.randn(16, 32)})
    codes = bg.Pipeline([Quantize("int3", group=16)]).run(program, max_drift=1.0)
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("parts.1",))]).run(codes), size=0.1)
    done = bg.Pipeline([Merge(requantize=0.6)]).run(tuned)
    assert "folded into int3 codes, which are 0." in done.history[-1].edits[0].what
    assert done.parameters["parts.1.weight_codes"].shape == codes.parameters["parts.1.weight_codes"].shape
