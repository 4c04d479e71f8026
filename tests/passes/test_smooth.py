"""Smooth: scales against a naive formula, where they go, what keeps its input, and int8 that is nearer with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu

import bmgraph as bg
from bmgraph.errors import InputError, MisplacedError, OrderError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.pass_manager.target import Target
from bmgraph.passes import LoadDelta, LoRA, Merge, Prune, Quantize, Shrink, Smooth, known_passes
from bmgraph.verify.metrics import relative_error

EXACT = 2e-6


def smoothed(program: Program, item: Smooth | None = None, **options: bool) -> Program:
    """The program after Smooth, calibrated on its example."""
    return bg.Pipeline([item or Smooth()]).run(program, calibration=[program.example], **options)  # type: ignore[arg-type]


def same(found: Program, expected: Program) -> bool:
    return all(
        relative_error(found(**expected.example)[name], value) < EXACT
        for name, value in expected(**expected.example).items()
    )


def captured(model: nn.Module, width: int = 16) -> Program:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 6, width, generator=generator) * torch.linspace(0.1, 8, width)
    return bg.capture(model.eval(), {"x": x})


class Residual(nn.Module):
    """A norm that a linear and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x + self.up(x)


def test_the_rewritten_graph_is_golden() -> None:
    size, stamp = "f32[batch, sequence, 16]", "site=up.weight part=smoothing pass=smooth"
    assert str(smoothed(captured(Residual()))) == (
        f"forward(x: {size}):\n"
        f"  %layer_norm = aten.layer_norm(%x, [16], norm.weight, norm.bias, 1e-05, False) : {size}\n"
        f"  %mul = aten.mul.Tensor(%layer_norm, up.weight_smoothing) : {size}  # {stamp}\n"
        f"  %linear = aten.linear(%mul, up.weight, up.bias) : {size}\n"
        f"  %add = aten.add.Tensor(%layer_norm, %linear) : {size}\n"
        "  return output=%add\n"
    )


class Shared(nn.Module):
    """A norm that two linears alone read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x * 3)
        return self.a(x) * self.b(x).tanh()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_scales_are_those_of_the_formula_and_fold_into_a_norm(alpha: float) -> None:
    model = Shared()
    with torch.no_grad():
        model.norm.weight.mul_(torch.rand(16) * 5 + 0.1)
        model.norm.bias.uniform_()
    program = captured(model)
    found = smoothed(program, Smooth(alpha=alpha))
    peaks = model.norm(program.example["x"] * 3).abs().amax((0, 1)).double()
    columns = torch.maximum(model.a.weight.abs().amax(0), model.b.weight.abs().amax(0)).double()
    scales = peaks**alpha / columns ** (1 - alpha)
    scales /= scales.log().mean().exp()
    for name, expected in (
        ("a.weight", model.a.weight * scales),
        ("b.weight", model.b.weight * scales),
        ("norm.weight", model.norm.weight / scales),
        ("norm.bias", model.norm.bias / scales),
    ):
        assert relative_error(found.parameters[name].double(), expected.detach()) < EXACT
    assert set(found.parameters) == set(program.parameters)
    assert same(found, program)


class Decoder(nn.Module):
    """Attention whose heads share values, and a gated or plain feed-forward."""

    def __init__(self, gated: bool = True, activation: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(16), nn.RMSNorm(16)
        self.q, self.o = nn.Linear(16, 16), nn.Linear(16, 16)
        self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.gate = nn.Linear(16, 24) if gated else None
        self.activation = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        q, k, v = (part(h).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        x = x + self.o(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.second(x)
        inner = self.up(h) if self.gate is None else self.activation(self.gate(h)) * self.up(h)
        return x + self.down(inner if self.gate is not None else self.activation(inner))


def test_scales_move_from_values_to_the_output_and_from_up_to_down() -> None:
    program = captured(Decoder())
    found = smoothed(program)
    assert set(found.parameters) == set(program.parameters)  # all is folded
    assert [edit.site for edit in found.history[-1].edits] == [
        f"{name}.weight" for name in ("q", "o", "gate", "down")
    ]
    assert not found.history[-1].declined
    assert same(found, program)
    wide = program.parameters["o.weight"] / found.parameters["o.weight"]
    by_head = wide[0].reshape(4, 4)
    assert torch.allclose(by_head[0], by_head[1])  # heads 0 and 1 share their values
    assert not torch.allclose(by_head[0], by_head[2])


def test_a_plain_feedforward_is_smoothed_behind_relu_alone() -> None:
    for activation, declined in ((nn.ReLU, set()), (nn.GELU, {"down.weight"})):
        program = captured(Decoder(gated=False, activation=activation))
        found = smoothed(program)
        assert {item.site for item in found.history[-1].declined} == declined
        assert same(found, program)


class Fused(nn.Module):
    """q, k and v of one linear, read by a decomposed attention, and a fused gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.both, self.down = nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(self.norm(x)).split(16, -1)
        )
        x = self.o(((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))
        gate, up = self.both(x).chunk(2, -1)
        return self.down(silu(gate) * up)


def test_only_rows_of_values_and_of_up_change_in_a_fused_weight() -> None:
    program = captured(Fused())
    found = smoothed(program, Smooth(exclude=("qkv", "both")))
    assert [edit.site for edit in found.history[-1].edits] == ["o.weight", "down.weight"]
    for name, kept in (("qkv.weight", 32), ("both.weight", 16)):
        old, new = program.parameters[name], found.parameters[name]
        assert torch.equal(old[:kept], new[:kept])
        assert not torch.isclose(old[kept:], new[kept:]).all(1).any()
    assert same(found, program)


class Unfit(nn.Module):
    """A square of a linear, a weight that is used twice, and a linear on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.twice, self.last = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.entry(x)
        return self.last(h * h) + self.twice(self.twice(h.relu()))


def test_what_keeps_its_input_is_told_with_a_reason() -> None:
    program = captured(Unfit())
    found = smoothed(program)
    assert str(found) == str(program)
    said = {item.site: item.what for item in found.history[-1].declined}
    assert said["twice.weight"] == "its weight is used 2 times"
    assert "no scale of its channels can be moved in front of mul" in said["last.weight"]
    assert set(said) == {"entry.weight", "twice.weight", "last.weight"}
    residual = smoothed(captured(Residual()), Smooth(multiply=False))
    assert residual.history[-1].declined[0].what == "add reads its input too"


def test_weights_that_passes_changed_keep_their_input() -> None:
    program = captured(Shared())
    for item, why in (
        (Prune(), "masked: smooth before Prune"),
        (LoRA(r=2, targets=("a",)), "a delta changes it"),
    ):
        found = bg.Pipeline([item, Smooth()]).run(program, calibration=[program.example])
        said = {one.site: one.what for one in found.history[-1].declined}
        assert why in said["a.weight"]
    with pytest.raises(OrderError, match=r"try this order: passes=\[smooth, quantize\]"):
        bg.Pipeline([Quantize(), Smooth()]).run(program, calibration=[program.example])


def test_it_runs_after_merge_and_before_prune_shrink_and_quantize() -> None:
    program = captured(Decoder())
    tuned = bg.Pipeline([LoRA(r=2)]).run(program)
    for name in set(tuned.parameters) - tuned.frozen:
        tuned.parameters[name] = torch.randn_like(tuned.parameters[name]) * 0.1
    passes = [Merge(), Smooth(), Shrink(ffn=0.25), Prune(), Quantize(activations="static")]
    done = bg.Pipeline(passes).run(tuned, calibration=[program.example])
    assert not next(record for record in done.history if record.text == "smooth").declined
    assert done.structure().roles == program.structure().roles


def test_a_delta_of_the_weights_before_is_refused(tmp_path: Path) -> None:
    program = captured(Shared())
    tuned = bg.Pipeline([LoRA(r=2, targets=("a",))]).run(program)
    tuned.save_delta(str(tmp_path))
    with pytest.raises(MisplacedError, match="another backbone"):
        bg.Pipeline([LoadDelta()]).run(smoothed(program), resources={"delta": str(tmp_path)})


def test_gradients_are_those_of_the_scaled_weights() -> None:
    program = captured(Decoder())
    assert same(smoothed(program, trains=True), program)


def test_int8_is_nearer_with_it_and_smooths_once() -> None:
    model = Shared()
    with torch.no_grad():
        model.norm.weight[3], model.norm.weight[9] = 30.0, 0.05
    program = captured(model)
    drift = {}
    for smooth in (False, True):
        item = Quantize(activations="static", outliers=False, smooth=smooth, smallest=8)
        record = bg.Pipeline([item]).run(program, calibration=[program.example]).history[-1]
        drift[smooth] = record.drift or 0.0
    assert drift[True] < 0.6 * drift[False]
    both = bg.Pipeline([Smooth(), Quantize(activations="static", smooth=True, smallest=8)])
    history = both.run(program, calibration=[program.example]).history
    assert [record.text.partition("{")[0] for record in history].count("smooth") == 1


def test_a_target_that_gains_by_it_smooths_and_an_old_history_does_not() -> None:
    program, target = captured(Shared()), Target("smooth", smooth=True)
    ran = {}
    for recorded in (False, True):
        passes = parse_passes("quantize{smallest=8}", known_passes(), recorded)
        done = bg.Pipeline(passes).run(program, calibration=[program.example], target=target)
        ran[recorded] = [record.text for record in done.history]
    assert ran[False][0] == "smooth"
    assert ran[True][-1] == "quantize@4{smallest=8,smooth=false}"
    assert "smooth" not in ran[True]


def test_bad_options_and_missing_data_are_refused() -> None:
    with pytest.raises(InputError, match=r"alpha=1\.5: give a number from 0 to 1"):
        Smooth(alpha=1.5)
    with pytest.raises(InputError, match="nothing rounds what it would smooth"):
        Quantize(activations="none", smooth=True)
    program = captured(Shared())
    for item in (Smooth(), Quantize(smooth=True)):
        with pytest.raises(ResourceError, match="calibration"):
            bg.Pipeline([item]).run(program)
    with pytest.raises(PassError, match="near it: a"):
        smoothed(program, Smooth(include=("aa",)))
    with pytest.raises(PassError, match="meta device"):
        bg.Pipeline([Smooth()]).run(program.to("meta"), calibration=[program.example])
