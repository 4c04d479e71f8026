"""Methods of Quantize against naive formulas: scales by error, HQQ, AWQ, coordinate descent; and what they do for outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, ResourceError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.layer_sites import InputSums, damped
from bmgraph.pass_manager.pass_spec import parse_passes
from bmgraph.passes import Quantize, known_passes
from bmgraph.passes.quantize.awq import ALPHAS, searched_blocks, searched_channels
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.channel_codes import ChannelCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, Encoded
from bmgraph.passes.quantize.gptq import gptq
from bmgraph.passes.quantize.hqq import BETA, GROWTH, NORM, STEPS, hqq_scales
from bmgraph.passes.quantize.mse import LEAST_SHARE, SHARES, mse_scales
from bmgraph.passes.quantize.quantease import descended, fitted_scales, quantease
from bmgraph.verify.measures import WeightsMoved
from bmgraph.verify.metrics import relative_error

FORM = BlockCodes(4, 16)


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values with long tails."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3


def near(value: float, scale: float, least: int = -8, most: int = 7) -> float:
    return min(most, max(least, round(value / scale))) * scale


def test_mse_takes_the_scale_with_the_least_square_error() -> None:
    values = heavy(4, 16).double()
    widest = FORM.widest(values).scale.squeeze(1)
    found = mse_scales(values, CodeGrid(widest), -8, 7).scale
    for row in range(4):
        errors = [
            sum((near(value, float(widest[row]) * share) - value) ** 2 for value in values[row].tolist())
            for share in SHARES
        ]
        assert float(found[row]) == pytest.approx(float(widest[row]) * SHARES[errors.index(min(errors))])


def test_hqq_is_the_loop_of_the_paper_on_scales() -> None:
    values = heavy(3, 16, 1).double()
    widest = FORM.widest(values).scale.squeeze(1)
    found = hqq_scales(values, CodeGrid(widest), -8, 7).scale
    for row in range(3):
        unit = float(widest[row])
        known = [value / unit for value in values[row].tolist()]
        share, best, kept, beta = 1.0, float("inf"), 1.0, BETA
        for _ in range(STEPS):
            codes = [min(7, max(-8, round(value / share))) for value in known]
            lost = [value - code * share for value, code in zip(known, codes)]
            error = sum(abs(value) ** NORM for value in lost)
            if error < best:
                best, kept = error, share
            outlying = [
                (1 if value > 0 else -1) * max(abs(value) - abs(value) ** (NORM - 1) / beta, 0)
                if value
                else 0
                for value in lost
            ]
            above = sum(code * (value - out) for code, value, out in zip(codes, known, outlying))
            share = min(1.0, max(LEAST_SHARE, above / sum(code * code for code in codes)))
            beta *= GROWTH
        assert float(found[row]) == pytest.approx(kept * unit, rel=1e-5)


def moments(columns: int, seed: int = 0) -> torch.Tensor:
    """X^T X of inputs whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.linspace(0.2, 4, columns)
    return (x.T @ x).double()


def test_fitted_scales_are_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmgraph.passes.quantize.quantease.RIDGE", 0.0)
    weight, second = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)), damped(moments(40))
    grid = FORM.widest(weight)
    codes, scale = FORM.nearest(weight, grid), grid.scale
    found = fitted_scales(FORM, weight, codes, grid, second.float())
    root = torch.linalg.cholesky(second)
    for row in range(3):
        parts = torch.zeros(40, 3, dtype=torch.float64)
        for block in range(3):
            parts[16 * block : 16 * (block + 1), block] = codes[row, 16 * block : 16 * (block + 1)].double()
        expected = torch.linalg.lstsq(root.T @ parts, root.T @ weight[row].double()[:, None]).solution[:, 0]
        assert bool((expected / scale[row]).log().abs().max() < 0.4)  # none is too far from where it was
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-6)


def test_descent_chooses_each_code_by_trying_all() -> None:
    weight, second = torch.randn(3, 70, generator=torch.Generator().manual_seed(3)), damped(moments(70))
    grid = FORM.widest(weight)
    codes = FORM.nearest(weight, grid)
    found = descended(FORM, weight, codes, grid, second.float())
    steps = grid.scale.repeat_interleave(16, 1)[:, :70].double()
    expected = codes.clone().double()
    for column in range(70):
        for row in range(3):
            errors = []
            for code in range(-8, 8):
                expected[row, column] = code
                lost = weight[row].double() - expected[row] * steps[row]
                errors.append(float(lost @ second @ lost))
            expected[row, column] = errors.index(min(errors)) - 8
    assert float((found.double() != expected).double().mean()) < 0.02  # ties in float32


def test_rows_that_count_alike_are_divided_by_their_norms() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(8))
    x[0, 0] *= 1000
    x[1, 4] = 0
    rows = [row / row.norm() for row in x.reshape(-1, 8) if row.norm() > 0]
    sums = InputSums(whole=True, alike=True)
    sums.add("x", x[:1])
    sums.add("x", x[1:])
    expected = sum(torch.outer(row, row) for row in rows)
    torch.testing.assert_close(sums._sums["x"].float(), expected)


def error_of(
    form: BlockCodes, weight: torch.Tensor, found: tuple[torch.Tensor, CodeGrid], second: torch.Tensor
) -> float:
    """The square error of outputs."""
    lost = (form.decode(form.stored(*found), weight.shape, 0) - weight).double()
    return float(((lost @ second) * lost).sum())


@pytest.mark.parametrize("form", [FORM, BlockCodes(4, 32, positive=True)])
def test_quantease_is_never_worse_than_gptq(form: BlockCodes) -> None:
    weight, second = heavy(24, 72, 4) / 4, moments(72)
    begun = gptq(form, weight, second)
    found = quantease(form, weight, second)
    loss = damped(second)
    assert error_of(form, weight, found, loss) < 0.9 * error_of(form, weight, begun, loss)
    assert not form.positive or bool((found[1].scale > 0).all())
    nothing = torch.zeros(72, 72, dtype=torch.float64)
    plain = quantease(form, weight, nothing)
    assert torch.equal(plain[0], form.nearest(weight, plain[1]))


def test_awq_searches_blocks_and_channels() -> None:
    weight, second = heavy(6, 40, 5), moments(40)
    found = searched_blocks(FORM, weight, second).scale
    widest = FORM.widest(weight).scale
    for block in range(3):
        span = slice(16 * block, min(16 * (block + 1), 40))
        errors = []
        for share in SHARES:
            steps = widest[:, block, None] * share
            lost = (
                torch.clamp(torch.round(weight[:, span] / steps), -8, 7) * steps - weight[:, span]
            ).double()
            errors.append(((lost @ second[span, span]) * lost).sum(-1))
        best = torch.stack(errors).argmin(0)
        same = found[:, block] / widest[:, block] - torch.tensor(SHARES)[best]
        assert float(same.abs().max()) < 1e-5
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(7))
    x[:, :2] *= 20
    weight, second = torch.randn(24, 40, generator=torch.Generator().manual_seed(6)), (x.T @ x).double()
    scales = searched_channels(FORM, [weight], second, torch.arange(40))
    size = second.diagonal().sqrt()
    errors = []
    for alpha in ALPHAS:
        tried = size**alpha / (size**alpha).log().mean().exp()
        wide = (weight * tried).float()
        rounded = FORM.decode(FORM.encode(wide, 0), wide.shape, 0)
        lost = rounded / tried - weight
        errors.append(float(((lost @ second) * lost).sum()))
    alpha = ALPHAS[errors.index(min(errors))]
    torch.testing.assert_close(scales, size**alpha / (size**alpha).log().mean().exp())
    assert alpha > 0
    shared = searched_channels(FORM, [weight], second, torch.arange(40) // 2)
    assert torch.equal(shared[::2], shared[1::2])


class Gated(nn.Module):
    """Two layers of norms and gated feed-forwards, whose channels differ in size."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict(
            {"norm": nn.RMSNorm(32), "gate": nn.Linear(32, 64, bias=False), "up": nn.Linear(32, 64, bias=False),
             "down": nn.Linear(64, 32, bias=False)}
        ) for _ in range(2))  # fmt: skip
        with torch.no_grad():
            for block in self.blocks:
                block["norm"].weight.copy_(torch.rand(32, generator=generator) ** 4 * 12 + 0.05)  # type: ignore[index]
                for name in ("gate", "up", "down"):
                    weight = block[name].weight  # type: ignore[index]
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block["norm"](x)  # type: ignore[index]
            x = x + block["down"](nn.functional.silu(block["gate"](h)) * block["up"](h))  # type: ignore[index]
        return x


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(32, 32, generator=torch.Generator().manual_seed(9))
    return {"x": torch.randn(8, 16, 32, generator=generator) @ mixed / 6}


@pytest.fixture(scope="module")
def gated() -> Program:
    return bg.capture(Gated().eval(), batch(0))


def test_gptq_counts_rows_alike_since_version_4(gated: Program) -> None:
    loud = [{"x": item["x"].clone()} for item in (batch(seed) for seed in range(6))]
    for item in loud:
        item["x"][:, 0] = item["x"][:, :1].amax(1) * 300  # a norm hides how loud, but not the direction
    done = {
        text: bg.Pipeline(parse_passes(text, known_passes())).run(gated, calibration=loud, max_drift=2.0)
        for text in (
            "quantize@3{scheme=int4,method=gptq}", "quantize@4{scheme=int4,method=gptq,alike=false}",
            "quantize{scheme=int4,method=gptq}", "quantize@3{scheme=int4,method=quantease}", "quantize{scheme=int4,method=quantease}",
        )
    }  # fmt: skip
    old, same, new, descended_old, descended_new = (
        item.parameters["blocks.1.down.weight_codes"] for item in done.values()
    )
    assert torch.equal(old, same)
    assert not torch.equal(old, new)
    assert torch.equal(descended_old, descended_new)
    with pytest.raises(InputError, match="alike=True: rtn measures no inputs"):
        Quantize("int4", alike=True)


def test_methods_on_data_move_outputs_less_each(gated: Program) -> None:
    calibration, moved = [batch(seed) for seed in range(6)], {}
    for method in ("rtn", "awq", "gptq", "quantease"):
        item = Quantize("int4", method=method, group=32, site_drift=1.0)
        done = bg.Pipeline([item]).run(gated, calibration=calibration, max_drift=1.0)
        moved[method] = sum(
            relative_error(done(**batch(seed))["output"], gated(**batch(seed))["output"]) for seed in (20, 21)
        )
        assert (
            done.history[-1]
            .edits[0]
            .what.startswith(
                "int4 weight" if method == "rtn" else f"int4 weight by {method}, its output moved by"
            )
        )
        if method == "awq":
            inner = done.history[-2]
            assert inner.text == "scalechannels"
            assert inner.effect == "exact"
            assert "method=awq" in inner.within
            scaled = {edit.site for edit in inner.edits}
            assert scaled == {f"blocks.{n}.{name}.weight" for n in range(2) for name in ("gate", "down")}
    assert moved["awq"] < 0.9 * moved["rtn"]
    assert moved["gptq"] < 0.9 * moved["rtn"]
    assert moved["quantease"] < 0.97 * moved["gptq"]


@pytest.mark.parametrize(("scheme", "method"), [("int4", "mse"), ("int4", "hqq"), ("int8", "mse")])
def test_methods_without_data_clip_within_their_measure(gated: Program, scheme: str, method: str) -> None:
    spiky = gated.clone()
    weight = heavy(64, 32)
    weight[3, 5] = 40.0
    spiky.parameters["blocks.0.up.weight"] = weight
    item = Quantize(scheme, activations="none", method=method)
    done = bg.Pipeline([item]).run(spiky, max_drift=1.0)
    form = BlockCodes(4, 32) if scheme == "int4" else ChannelCodes(127)
    codes, scale = done.parameters["blocks.0.up.weight_codes"], done.parameters["blocks.0.up.weight_scale"]
    plain = form.encode(weight, 0)
    power = 2.0 if method == "mse" else NORM

    def error(found: Encoded) -> torch.Tensor:
        return (form.decode(found, weight.shape, 0) - weight).double().abs().pow(power).sum(1)

    assert bool((error(Encoded(codes, scale)) <= error(plain) * (1 + 1e-6)).all())
    if scheme == "int8":  # 255 codes are enough without clipping
        return
    assert bool((scale.flatten().abs() < 0.98 * plain[1].flatten().abs()).any())
    node = next(item for item in done.graph.nodes if item.meta.get("site") == "blocks.0.up.weight")
    with pytest.raises(VerificationError, match="beyond its codes"):
        WeightsMoved(1.0).check(spiky, done, [("blocks.0.up.weight", node)], ())


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([mse_scales, hqq_scales]), st.integers(1, 3), st.integers(1, 70), st.sampled_from([16, 32]),
    st.booleans(), st.integers(0, 2**31),
)  # fmt: skip
def test_codes_are_within_half_a_step_or_clipped(
    rule: object, rows: int, columns: int, block: int, positive: bool, seed: int
) -> None:
    weight, form = heavy(rows, columns, seed), BlockCodes(4, block, positive)
    codes, scale, _ = form.encode(weight, 0, rule)  # type: ignore[arg-type]
    value = form.decode(Encoded(codes, scale), weight.shape, 0)
    steps = scale.repeat_interleave(block, 1)[:, :columns]
    lowest, highest = form.least * steps, form.most * steps
    inside = torch.minimum(
        torch.maximum(weight, torch.minimum(lowest, highest)), torch.maximum(lowest, highest)
    )
    assert bool(((value - inside).abs() <= steps.abs() * (0.5 + 1e-4)).all())
    widest = form.widest(weight).scale
    assert bool((scale / widest >= LEAST_SHARE - 1e-6).all())
    assert bool((scale / widest <= 1 + 1e-6).all())


def test_what_does_not_fit_is_refused(gated: Program) -> None:
    with pytest.raises(InputError, match="choose one of rtn, mse, hqq, awq, gptq, quantease"):
        Quantize("int4", method="best")
    with pytest.raises(InputError, match="int8 has rtn and mse"):
        Quantize("int8", method="awq")
    for method in ("awq", "quantease"):
        with pytest.raises(ResourceError, match="the resource 'calibration', which was not given"):
            bg.Pipeline([Quantize("int4", method=method)]).run(gated)
        with pytest.raises(ResourceError, match="holds no batch"):
            bg.Pipeline([Quantize("int4", method=method)]).run(gated, calibration=[])
        spoilt = {"x": batch(0)["x"] * float("nan")}
        with pytest.raises(ResourceError, match=r"calibration batch 1 makes .* NaN"):
            bg.Pipeline([Quantize("int4", method=method)]).run(gated, calibration=[batch(0), spoilt])
