"""Quantize: golden graph, values against naive quantization, what it declines, and sites found afterwards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, OrderError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.ops.quantization import dequantize, quantize_dynamic, quantize_static
from bmgraph.pass_manager.target import Target
from bmgraph.passes import Quantize
from bmgraph.verify.metrics import relative_error

Batches = list[dict[str, torch.Tensor]]


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    small = bg.Pipeline([Quantize("int8", activations="dynamic")]).run(program)
    stamp = "site=weight part={} pass=quantize{{activations=dynamic}}"
    assert str(small) == (
        "forward(input: f32[batch, 16]):\n"
        f"  %dequantize = bmgraph.dequantize(weight_codes, weight_scale, 0) : f32[24, 16]  # {stamp.format('weight')}\n"
        f"  %quantize_dynamic = bmgraph.quantize_dynamic(%input) : f32[batch, 16]  # {stamp.format('activation')}\n"
        "  %linear = aten.linear(%quantize_dynamic, %dequantize, bias) : f32[batch, 24]\n"
        "  return output=%linear\n"
    )


def test_static_numbers_equal_the_naive_form() -> None:
    torch.manual_seed(1)
    model = nn.Linear(16, 24)
    x = torch.randn(5, 16)
    program = bg.capture(model, {"input": x})
    found = bg.Pipeline([Quantize("int8", activations="static", outliers=False)]).run(
        program, calibration=[{"input": x}]
    )
    weight = model.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step
    expected = rounded @ (torch.round(weight / scale) * scale).T + model.bias.detach()
    assert relative_error(found(input=x)["output"], expected) < 1e-6


def test_a_symmetric_target_gets_codes_around_zero() -> None:
    torch.manual_seed(1)
    model = nn.Linear(16, 24)
    x = torch.randn(5, 16) + 1
    program = bg.capture(model, {"input": x})
    target = Target("around zero", activation_modes=("static", "none"), symmetric=True)
    small = bg.Pipeline([Quantize("int8")]).run(program, calibration=[{"input": x}], target=target)
    (zero,) = [value for name, value in small.parameters.items() if name.endswith("input_zero")]
    assert zero.dtype == torch.int8
    assert int(zero) == 0
    weight = model.weight.detach()
    scale, step = weight.abs().amax(1, keepdim=True) / 127, x.abs().max() / 127
    rounded = torch.clamp(torch.round(x / step), -128, 127) * step
    expected = rounded @ (torch.round(weight / scale) * scale).T + model.bias.detach()
    assert relative_error(small(input=x)["output"], expected) < 1e-6
    without = bg.Pipeline([Quantize("int8")]).run(program, target=target)
    assert without.history[-1].edits[0].what == "int8 weight"


def test_a_form_that_a_target_does_not_take_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match="far takes static, none activations, not dynamic"):
        bg.Pipeline([Quantize("int8", activations="dynamic")]).run(
            program, target=Target("far", ("static", "none"))
        )
    with pytest.raises(PassError, match="far takes no weights with one scale for each channel"):
        bg.Pipeline([Quantize("int8")]).run(program, target=Target("far", weight_scales=("tensor",)))


def test_a_weight_stored_the_other_way_has_scales_along_its_outputs() -> None:
    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.randn(24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.b, x, self.w)

    program = bg.capture(Stored(), {"x": torch.randn(3, 16)})
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    assert small.parameters["w_codes"].shape == (16, 24)
    assert small.parameters["w_scale"].shape == (24,)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 1e3))
def test_decoding_a_code_is_within_half_a_step(rows: int, columns: int, size: float) -> None:
    weight = torch.randn(rows, columns) * size
    codes, scale, _ = Quantize("int8").codes(weight, 0)
    error = (dequantize(codes, scale, 0) - weight).abs()
    assert bool((error <= 0.5 * scale[:, None] * (1 + 1e-4)).all())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 255))
def test_rounding_twice_is_rounding_once(scale: float, zero: int) -> None:
    x, step, offset = torch.randn(50) * 20, torch.tensor(scale), torch.tensor(zero, dtype=torch.uint8)
    once = quantize_static(x, step, offset)
    assert torch.allclose(quantize_static(once, step, offset), once)


def test_gradients_pass_straight_through_where_nothing_clips() -> None:
    x = torch.tensor([-300.0, 0.3, 0.7, 300.0], requires_grad=True)
    quantize_static(x, torch.tensor(0.5), torch.tensor(128, dtype=torch.uint8)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    y = torch.randn(4, requires_grad=True)
    quantize_dynamic(y).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [1.0] * 4


def test_drift_is_small_and_roles_stay(program: Program, batches: Batches) -> None:
    for mode in ("static", "dynamic", "none"):
        small = bg.Pipeline([Quantize("int8", activations=mode)]).run(program, calibration=batches)
        assert small.history[-1].drift is not None
        assert 0 < small.history[-1].drift < 0.1
        before, after = small.history[-1].before, small.history[-1].after
        assert before is not None
        assert after is not None
        assert after.bytes < before.bytes
        assert small.structure().roles == program.structure().roles


def test_globs_choose_and_wrong_ones_are_refused(program: Program) -> None:
    some = bg.Pipeline(
        [Quantize("int8", activations="none", include=("blocks.*",), exclude=("*.down",))]
    ).run(program)
    sites = {edit.site for edit in some.history[-1].edits}
    assert len(sites) == 2 * 5
    with pytest.raises(PassError, match=r"exclude='\*\.dwn' fits no site; near it: .*down"):
        bg.Pipeline([Quantize("int8", exclude=("*.dwn",))]).run(program)


def test_a_site_that_drifts_stays_float(program: Program, batches: Batches) -> None:
    with pytest.raises(PassError, match=r"changed nothing.*more than site_drift"):
        bg.Pipeline([Quantize("int8", activations="dynamic", site_drift=1e-9)]).run(
            program, calibration=batches
        )


def test_a_tied_embedding_is_declined() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mid, self.head = (
                nn.Embedding(40, 16),
                nn.Linear(16, 16),
                nn.Linear(16, 40, bias=False),
            )
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.mid(self.embed(ids)))

    program = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    record = bg.Pipeline([Quantize("int8", activations="none")]).run(program).history[-1]
    assert [edit.site for edit in record.edits] == ["mid.weight"]
    assert record.declined[0].site == "embed.weight"
    assert "something else reads its weight" in record.declined[0].what


def test_missing_calibration_and_invalid_options_are_refused(program: Program) -> None:
    with pytest.raises(ResourceError, match="calibration=batches"):
        bg.Pipeline([Quantize("int8", activations="static")]).run(program)
    with pytest.raises(ResourceError, match="read only once"):
        bg.Pipeline([Quantize("int8", activations="static")]).run(program, calibration=iter([{}]))
    with pytest.raises(OrderError, match=r"cannot run on a program that is quantized"):
        bg.Pipeline([Quantize("int8"), Quantize("int8")]).run(program)
    with pytest.raises(InputError, match="choose static, dynamic, none or blocks"):
        Quantize("int8", activations="sometimes")


def test_a_meta_program_is_quantized_without_weights(program: Program) -> None:
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program.to("meta"))
    assert small.history[-1].compared == "not compared"
    assert small.parameters["blocks.0.up.weight_codes"].device.type == "meta"


def test_the_given_program_is_left_alone(program: Program, batches: Batches) -> None:
    text, names = str(program), list(program.parameters)
    bg.Pipeline([Quantize("int8")]).run(program, calibration=batches)
    assert str(program) == text
    assert list(program.parameters) == names


def test_a_masked_weight_keeps_its_zeros() -> None:
    torch.manual_seed(0)
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    masked = program.clone()
    with masked.edit(by="mask") as editor:
        (linear,) = [node for node in editor.graph.nodes if node.target is torch.ops.aten.linear.default]
        weight = linear.args[1]
        mask = editor.parameter("weight_mask", (torch.rand(24, 16) > 0.5).float(), frozen=True, part="mask")
        product = editor.call(
            torch.ops.aten.mul.Tensor, weight, mask, like=linear, site="weight", part="weight"
        )
        linear.replace_input_with(weight, product)
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(masked)
    assert bool((small.parameters["weight_codes"][masked.parameters["weight_mask"] == 0] == 0).all())
    assert "weight_mask" not in small.parameters


class Twice(nn.Module):
    """One linear used on two values, the second with an outlier that 8 bits do not cover."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.last(self.shared(x).tanh() + self.shared(y).tanh())


def test_a_weight_with_one_use_that_drifts_stays_float_for_all() -> None:
    torch.manual_seed(0)
    y = torch.randn(40, 16) * 0.01
    y[0, 0] = 300.0
    batch = {"x": torch.randn(40, 16), "y": y}
    program = bg.capture(Twice(), batch)
    item = Quantize("int8", activations="static", outliers=False, site_drift=0.02)
    batch["y"] = y[1:].repeat(2, 1)[:40]
    loud = {**batch, "y": y}
    small = bg.Pipeline([item]).run(program, calibration=[loud, batch])
    record = small.history[-1]
    assert [edit.site for edit in record.edits] == ["last.weight"]
    assert [edit.site for edit in record.declined] == ["shared.weight"]
    assert torch.equal(small.parameters["shared.weight"], program.parameters["shared.weight"])


def test_a_weight_read_both_ways_is_declined() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(24, 16) / 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.w).tanh() @ self.w

    program = bg.capture(Tied(), {"x": torch.randn(3, 16)})
    with pytest.raises(PassError, match="w: its outputs lie along one axis in one use"):
        bg.Pipeline([Quantize("int8", activations="none")]).run(program)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite_is_told(bad: float) -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    x = torch.randn(3, 16)
    captured = bg.capture(model, {"input": x})
    spoilt = x.clone()
    spoilt[1, 2] = bad
    for mode in ("static", "dynamic"):
        with pytest.raises(ResourceError, match="calibration batch 1 makes the input 'input'"):
            bg.Pipeline([Quantize("int8", activations=mode)]).run(
                captured, calibration=[{"input": x}, {"input": spoilt}]
            )


def test_a_target_of_static_scales_alone_asks_for_calibration() -> None:
    program = bg.capture(nn.Linear(16, 24), {"input": torch.randn(3, 16)})
    with pytest.raises(ResourceError, match=r"still takes static activations only.*calibration"):
        bg.Pipeline([Quantize("int8")]).run(program, target=Target("still", ("static",)))
