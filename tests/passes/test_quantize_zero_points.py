"""Quantize(symmetric=False): codes with zero points by naive formulas, on engines, under masks and deltas, and where they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx.read_block_codes import read_block_codes
from bmgraph.backends.tensorrt.legalize import check_quantization
from bmgraph.errors import BackendError, InputError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.ops.block_codes import unpack_codes, unpack_zeros, zero_bytes
from bmgraph.pass_manager.layer_sites import DAMPING, damped
from bmgraph.pass_manager.target import Target
from bmgraph.passes import DoRA, LoRA, Merge, Prune, Quantize
from bmgraph.passes.quantize.awq import searched_blocks
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid
from bmgraph.passes.quantize.gptq import SHARES, gptq, searched_grid
from bmgraph.passes.quantize.hqq import NORM, hqq_scales
from bmgraph.passes.quantize.mse import LEAST_SHARE, mse_scales
from bmgraph.passes.quantize.quantease import descended, fitted_scales, moved_zeros, quantease
from bmgraph.verify.measures import WeightsMoved
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import Stored, trained
from tests.helpers.models import tied_decoder, tokens
from tests.passes.test_quantize_methods import heavy, moments

FORM = BlockCodes(4, 16, symmetric=False)
ANY = Target("any", ("blocks", "none"), weight_scales=("channel", "block"), block_bits=(2, 3, 4, 8))


def nearest(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zero points of 4 bits by the formula, a block at a time: 15 steps from the least value, or 0, to the largest."""
    count = -(-weight.shape[1] // block)
    codes, zero = (
        torch.zeros(weight.shape, dtype=torch.int8),
        torch.zeros(len(weight), count, dtype=torch.int8),
    )
    scale = torch.ones(len(weight), count)
    for row in range(len(weight)):
        for number, first in enumerate(range(0, weight.shape[1], block)):
            values = weight[row, first : first + block]
            low, high = values.min().clamp(max=0), values.max().clamp(min=0)
            scale[row, number] = (high - low) / 15 if high > low else 1.0
            zero[row, number] = torch.round(-8 - low / scale[row, number])
            shifted = torch.round(values / scale[row, number]) + zero[row, number]
            codes[row, first : first + block] = torch.clamp(shifted, -8, 7)
    return codes, scale, zero


def steps_of(codes: torch.Tensor, grid: CodeGrid) -> torch.Tensor:
    """What 4-bit codes in blocks of 16 stand for, f64[N, K]."""
    assert grid.zero is not None
    shift, scale = (
        item.repeat_interleave(16, 1)[:, : codes.shape[1]].double() for item in (grid.zero, grid.scale)
    )
    return (codes.double() - shift) * scale


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(40, 24), {"input": torch.randn(3, 40)})
    small = bg.Pipeline([Quantize("int4", symmetric=False)]).run(program)
    assert str(small) == (
        "forward(input: f32[batch, 40]):\n"
        "  %dequantize_blocks = bmgraph.dequantize_blocks(weight_codes, weight_scale, 4, 40, weight_zero) : f32[24, 40]"
        "  # site=weight part=weight pass=quantize{scheme=int4,symmetric=false}\n"
        "  %linear = aten.linear(%input, %dequantize_blocks, bias) : f32[batch, 24]\n"
        "  return output=%linear\n"
    )
    assert {name: list(item.shape) for name, item in small.parameters.items()} == {
        "bias": [24], "weight_codes": [24, 2, 16], "weight_scale": [24, 2], "weight_zero": [24, 1],
    }  # fmt: skip
    assert {"weight_codes", "weight_scale", "weight_zero"} <= small.frozen


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nearest_codes_are_those_of_the_formula(stored: bool, dtype: torch.dtype) -> None:
    model = (Stored(40, 24) if stored else nn.Linear(40, 24)).to(dtype)
    program = bg.capture(model, (torch.randn(3, 40, dtype=dtype),))
    small = bg.Pipeline([Quantize("int4", group=16, symmetric=False)]).run(program)
    name = "w" if stored else "weight"
    weight = program.parameters[name].float()
    codes, scale, zero = nearest(weight.T if stored else weight, 16)
    found = {end: small.parameters[f"{name}_{end}"] for end in ("codes", "scale", "zero")}
    torch.testing.assert_close(found["scale"], scale.to(dtype))
    assert torch.equal(unpack_zeros(found["zero"], 4, 3), zero)
    if dtype == torch.float32:
        assert torch.equal(unpack_codes(found["codes"], 4, 40), codes)
    assert small.structure().roles == program.structure().roles


def test_gptq_is_the_textbook_loop_around_zero_points() -> None:
    """Column by column, with the inverse of what is left of the second moments (arXiv:2210.17323, equations 2 and 3)."""
    torch.manual_seed(3)
    weight, x = torch.randn(5, 40) + 0.5, torch.randn(60, 40) @ torch.randn(40, 40)
    second = (x.T @ x).double()
    codes, grid = gptq(FORM, weight, second)
    searched = searched_grid(FORM, weight, second.diagonal().float())
    assert grid.zero is not None
    assert searched.zero is not None
    assert torch.equal(grid.scale, searched.scale)
    assert torch.equal(grid.zero, searched.zero)
    left, expected = weight.double(), torch.zeros_like(codes)
    waiting = sorted(range(40), key=lambda column: -float(second[column, column]))
    whole = second + DAMPING * second.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    while waiting:
        inverse, column = torch.linalg.inv(whole[waiting][:, waiting]), waiting[0]
        step, zero = (item[:, column // 16].double() for item in (grid.scale, grid.zero))
        expected[:, column] = torch.clamp(torch.round(left[:, column] / step) + zero, -8, 7)
        lost = (left[:, column] - (expected[:, column] - zero) * step) / inverse[0, 0]
        left[:, waiting] -= lost[:, None] * inverse[0]
        waiting = waiting[1:]
    assert torch.equal(codes, expected)
    nothing = torch.zeros(40, 40, dtype=torch.float64)  # no input was seen: the nearest codes
    found, by = gptq(FORM, weight, nothing)
    assert torch.equal(found, FORM.nearest(weight, by))


def test_a_searched_grid_is_the_best_of_shares_and_neighbours() -> None:
    weight, importance = heavy(3, 32, 9), torch.rand(32)
    found, widest = searched_grid(FORM, weight, importance), FORM.widest(weight)
    assert found.zero is not None
    assert widest.zero is not None
    for row in range(3):
        for block in range(2):
            values, weights = weight[row, 16 * block :][:16], importance[16 * block :][:16]
            tried = []
            for shift in (0, -1, 1):
                zero = min(7.0, max(-8.0, float(widest.zero[row, block]) + shift))
                for share in SHARES:
                    step = float(widest.scale[row, block]) * share
                    near = (torch.clamp(torch.round(values / step) + zero, -8, 7) - zero) * step
                    tried.append((float(((near - values) ** 2 * weights).sum()), step, zero))
            _, step, zero = min(tried, key=lambda item: item[0])
            assert float(found.scale[row, block]) == pytest.approx(step, rel=1e-5)
            assert float(found.zero[row, block]) == zero


def test_scales_are_fitted_and_codes_descend_around_zero_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmgraph.passes.quantize.quantease.RIDGE", 0.0)
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(2)) + 0.7
    second, grid = damped(moments(40)), FORM.widest(weight)
    assert grid.zero is not None
    codes = FORM.nearest(weight, grid)
    scale = fitted_scales(FORM, weight, codes, grid, second.float())
    root = torch.linalg.cholesky(second)
    for row in range(3):
        parts = torch.zeros(40, 3, dtype=torch.float64)
        for block in range(3):
            span = slice(16 * block, 16 * (block + 1))
            parts[span, block] = codes[row, span].double() - grid.zero[row, block]
        fitted = torch.linalg.lstsq(root.T @ parts, root.T @ weight[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(scale[row].double(), fitted, rtol=1e-4, atol=1e-6)
    found = descended(FORM, weight, codes, grid, second.float())
    expected = codes.clone()
    for column in range(40):
        tried = []
        for code in range(-8, 8):
            expected[:, column] = code
            lost = weight.double() - steps_of(expected, grid)
            tried.append(((lost @ second) * lost).sum(-1))
        expected[:, column] = torch.stack(tried).argmin(0).to(torch.int8) - 8
    assert float((found != expected).double().mean()) < 0.02  # ties in float32


def test_methods_lose_less_with_zero_points_where_values_lie_to_one_side() -> None:
    weight, second = heavy(24, 72, 4).abs() - 0.3, moments(72)
    loss, plain = damped(second), BlockCodes(4, 16)

    def error(form: BlockCodes, found: tuple[torch.Tensor, CodeGrid], power: float = 0.0) -> float:
        lost = (form.decode(form.stored(*found), weight.shape, 0) - weight).double()
        return float(lost.abs().pow(power).sum() if power else ((lost @ loss) * lost).sum())

    for method in (gptq, quantease):
        assert error(FORM, method(FORM, weight, second)) < 0.6 * error(plain, method(plain, weight, second))
    assert error(FORM, quantease(FORM, weight, second)) < 0.95 * error(FORM, gptq(FORM, weight, second))
    widest, blocks = FORM.widest(weight), FORM.in_blocks(weight)
    begun = FORM.nearest(weight, widest), widest
    for rule, power in ((mse_scales, 2.0), (hqq_scales, NORM)):
        grid = rule(blocks, widest, -8, 7)
        assert error(FORM, (FORM.nearest(weight, grid), grid), power) < error(FORM, begun, power)
        assert bool((grid.scale >= LEAST_SHARE * widest.scale * (1 - 1e-6)).all())
        stored = FORM.encode(weight, 0, rule)
        assert torch.equal(stored.scale, grid.scale)
    grid = searched_blocks(FORM, weight, second)
    assert error(FORM, (FORM.nearest(weight, grid), grid)) < error(FORM, begun)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_move_where_outputs_lose_less(bits: int) -> None:
    form = BlockCodes(bits, 16, symmetric=False)
    weight, second = heavy(24, 72, 11), damped(moments(72)).float()
    widest = form.widest(weight)
    assert widest.zero is not None
    grid = CodeGrid(widest.scale * 0.7, (widest.zero - 1).clamp(form.least, form.most))
    codes = form.nearest(weight, grid)

    def errors(held: torch.Tensor, at: CodeGrid) -> torch.Tensor:
        lost = (form.decode(form.stored(held, at), weight.shape, 0) - weight).double()
        return ((lost @ second.double()) * lost).sum(-1)

    found, moved = moved_zeros(form, weight, codes, grid, second)
    assert moved.zero is not None
    assert grid.zero is not None
    before, after = errors(codes, grid), errors(found, moved)
    assert bool((after <= before * (1 + 1e-5)).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    assert float((moved.zero - grid.zero).abs().max()) == 1
    assert int(found.min()) >= form.least
    assert int(found.max()) <= form.most


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tied_decoder(), tokens())


@pytest.mark.parametrize(
    "scheme",
    ["int4", pytest.param("int2", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("activations", ["blocks", pytest.param("none", marks=pytest.mark.slow)])
def test_engines_read_zero_points(
    decoder: Program, tmp_path: Path, scheme: str, backend: str, activations: str
) -> None:
    pytest.importorskip("onnxruntime" if backend == "onnx" else "openvino")
    if scheme == "int2" and backend == "openvino":
        pytest.skip("it has no codes of 2 bits")
    item = Quantize(scheme, group=16, embeddings=8, activations=activations, symmetric=False)
    program = bg.Pipeline([item]).run(decoder, target=ANY, max_drift=2.0)
    engine = bg.compile(decoder, [item], backend=backend, max_drift=2.0)
    engine.save(tmp_path / "engine")
    again, batch = bg.load(tmp_path / "engine"), tokens(2, 7, 3)
    # at 8 bits a last bit of a sum more often crosses a step of what is rounded
    bound = 1e-2 if scheme == "int8" and activations == "blocks" else 1e-4
    assert relative_error(again(**batch)["output"], program(**batch)["output"]) < bound
    held = program.parameters
    zeros = {name: item for name, item in held.items() if name.endswith("_zero")}
    assert {"embed.weight_zero", "embed.weight_rows_zero", "blocks.0.q.weight_zero"} <= set(zeros)
    bits = {name: 8 if "rows" in name or "places" in name else int(scheme[3:]) for name in zeros}
    for name, zero in zeros.items():
        scale = held[name.removesuffix("zero") + "scale"]
        assert list(zero.shape) == [len(scale), zero_bytes(scale.shape[1], bits[name])]
    program.save(tmp_path / "program")
    assert torch.equal(bg.load(tmp_path / "program")(**batch)["output"], program(**batch)["output"])


def test_calibrated_methods_replay(decoder: Program, tmp_path: Path) -> None:
    calibration = [tokens(4, 12, seed) for seed in range(2)]
    for method in ("awq", "quantease"):
        item = Quantize("int3", method=method, group=64, site_drift=2.0, symmetric=False)
        done = bg.Pipeline([item]).run(decoder, calibration=calibration, max_drift=2.0)
        done.save(tmp_path / method)
        again = bg.replay(tmp_path / method, decoder, calibration=calibration)
        assert "blocks.0.q.weight_zero" in again.parameters
        assert all(torch.equal(again.parameters[name], value) for name, value in done.parameters.items())


def test_masks_and_deltas_sit_on_them(program: Program) -> None:
    item = Quantize("int4", group=16, symmetric=False)
    codes = bg.Pipeline([item]).run(program, max_drift=1.0)
    pruned = bg.Pipeline([Prune(include=("head",))]).run(codes, max_drift=2.0)
    served = deployed(pruned)
    assert not any(
        "mul" in str(node.target) for node in served.graph.nodes if node.meta.get("site") == "head.weight"
    )
    torch.testing.assert_close(served(**tokens())["logits"], pruned(**tokens())["logits"], rtol=0, atol=0)
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("q",))]).run(codes), size=0.1)
    merged = bg.Pipeline([Merge(requantize=0.2)]).run(tuned)
    a, b = (tuned.parameters[f"blocks.0.q.weight_lora_{end}"] for end in "ab")
    stored = FORM.encode(program.parameters["blocks.0.q.weight"], 0)
    expected = nearest(FORM.decode(stored, torch.Size((32, 32)), 0) + 8 * b @ a, 16)
    assert torch.equal(unpack_zeros(merged.parameters["blocks.0.q.weight_zero"], 4, 2), expected[2])
    assert torch.equal(unpack_codes(merged.parameters["blocks.0.q.weight_codes"], 4, 32), expected[0])


def test_a_delta_that_reads_the_weight_is_computed_once() -> None:
    plain = bg.capture(nn.Linear(48, 32), (torch.randn(3, 48),))
    passes = [Quantize("int4", symmetric=False), DoRA(r=2, targets=("*",))]
    served = deployed(trained(bg.Pipeline(passes).run(plain, max_drift=1.0), size=0.1))
    x = torch.randn(5, 48)
    expected = served(input=x)["output"]
    assert read_block_codes(served) == 1
    assert relative_error(served(input=x)["output"], expected) < 1e-5


def test_wrong_codes_are_named(program: Program) -> None:
    item = Quantize("int4", symmetric=False)
    small = bg.Pipeline([item]).run(program, max_drift=1.0)
    node = next(found for found in small.graph.nodes if "dequantize_blocks" in str(found.target))
    site = str(node.meta["site"])
    measure = WeightsMoved(2.0)
    measure.check(program, small, [(site, node)], ())
    for name, change, said in (
        ("codes", lambda value: value ^ 2, "a code is .* scales away"),
        ("zero", lambda value: value ^ 2, "a code is .* scales away|beyond its codes"),
        ("scale", lambda value: value * 1.3, "its scale is too large|scales away"),
    ):
        wrong = small.clone()
        wrong.parameters[f"{site}_{name}"] = change(small.parameters[f"{site}_{name}"])
        with pytest.raises(VerificationError, match=f"{site}.*({said})"):
            measure.check(program, wrong, [(site, node)], ())
    clipped = small.clone()  # honest codes, on a grid that leaves values out
    values = program.parameters[site]
    form = BlockCodes(4, 32, symmetric=False)
    stored = form.encode(
        values, 0, lambda blocks, widest, least, most: CodeGrid(widest.scale * 0.7, widest.zero)
    )
    for name, tensor in stored._asdict().items():
        clipped.parameters[f"{site}_{name}"] = tensor
    with pytest.raises(VerificationError, match=f"{site}.* scales beyond its codes: its scale is too small"):
        measure.check(program, clipped, [(site, node)], ())


def test_what_has_no_kernel_is_refused(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match="symmetric=False: int8 codes with one scale for each output have no zero points; give group=",
    ):
        Quantize("int8", symmetric=False)
    assert Quantize("int4", group_size=16, is_symmetric=False) == Quantize("int4", group=16, symmetric=False)
    without = Target("elsewhere", ("none",), weight_scales=("block",), zero_points=False)
    item = Quantize("int4", symmetric=False, group=16)
    with pytest.raises(
        PassError, match="elsewhere takes no codes with zero points: leave symmetric=False out"
    ):
        bg.Pipeline([item]).run(program, target=without)
    codes = bg.Pipeline([item]).run(program, max_drift=1.0)
    with pytest.raises(BackendError, match="TensorRT does not support its codes, which have zero points"):
        check_quantization(deployed(codes))
    few = bg.Pipeline([Quantize("int2", group=32, activations="blocks")]).run(
        program, target=ANY, max_drift=2.0
    )

    def installed(*version: int) -> None:
        monkeypatch.setattr("bmgraph.backends.onnx.read_block_codes.onnxruntime_version", lambda: version)

    installed(1, 23)
    with pytest.raises(
        BackendError,
        match=r"q.weight: its weight is in 2-bit codes, which onnxruntime multiplies by since 1.24, and 1.23 is",
    ):
        read_block_codes(deployed(few))
    for version, left in (
        ((1, 27), True),
        ((1, 28), False),
    ):  # before, its kernel rounds no inputs: the graph does
        installed(*version)
        served = deployed(few)
        read_block_codes(served)
        assert any("quantize_blocks" in str(node.target) for node in served.graph.nodes) == left
