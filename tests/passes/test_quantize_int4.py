"""Quantize("int4"): golden graph, naive formulas of rounding and GPTQ, what is declined, engines, deltas on codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends.onnx.read_block_codes import read_block_codes
from bmgraph.errors import BackendError, InputError, PassError, ResourceError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.ops.block_codes import unpack_codes
from bmgraph.pass_manager.layer_sites import DAMPING
from bmgraph.pass_manager.target import Target
from bmgraph.passes import DoRA, LoRA, Merge, Prune, Quantize
from bmgraph.passes.quantize.block_codes import BlockCodes
from bmgraph.passes.quantize.code_grid import CodeGrid, Encoded
from bmgraph.passes.quantize.gptq import gptq, searched_grid
from bmgraph.verify.measures import WeightsMoved
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import Stored, trained
from tests.helpers.models import tied_decoder, tokens


def nearest(weight: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales by the formula, a block at a time: the value of the largest magnitude gets -8."""
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    scale = torch.ones(len(weight), -(-weight.shape[1] // block))
    for row in range(len(weight)):
        for number, first in enumerate(range(0, weight.shape[1], block)):
            values = weight[row, first : first + block]
            largest = max(values.tolist(), key=abs)
            scale[row, number] = torch.tensor(largest) / -8 if largest else 1.0
            codes[row, first : first + block] = torch.clamp(torch.round(values / scale[row, number]), -8, 7)
    return codes, scale


@pytest.fixture(scope="module")
def decoder() -> Program:
    return bg.capture(tied_decoder(), tokens())


@pytest.fixture(scope="module")
def calibration() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 12, seed) for seed in range(4)]


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(40, 24), {"input": torch.randn(3, 40)})
    small = bg.Pipeline([Quantize("int4")]).run(program)
    assert str(small) == (
        "forward(input: f32[batch, 40]):\n"
        "  %dequantize_blocks = bmgraph.dequantize_blocks(weight_codes, weight_scale, 4, 40) : f32[24, 40]"
        "  # site=weight part=weight pass=quantize{scheme=int4}\n"
        "  %linear = aten.linear(%input, %dequantize_blocks, bias) : f32[batch, 24]\n"
        "  return output=%linear\n"
    )
    target = Target("of blocks", ("none", "blocks"), weight_scales=("block",))
    rounded = bg.Pipeline([Quantize("int4")]).run(program, target=target)
    assert "%quantize_blocks = bmgraph.quantize_blocks(%input, 32)" in str(rounded)


@pytest.mark.parametrize("stored", [False, True])
def test_the_nearest_codes_are_those_of_the_formula(stored: bool) -> None:
    model = Stored(40, 24) if stored else nn.Linear(40, 24)
    program = bg.capture(model, (torch.randn(3, 40),))
    small = bg.Pipeline([Quantize("int4", group=16)]).run(program)
    name = "w" if stored else "weight"
    weight = program.parameters[name]
    codes, scale = nearest(weight.T if stored else weight, 16)
    assert torch.equal(unpack_codes(small.parameters[f"{name}_codes"], 4, 40), codes)
    assert torch.equal(small.parameters[f"{name}_scale"], scale)
    assert small.structure().roles == program.structure().roles
    positive = BlockCodes(4, 16, positive=True)
    found, steps, _ = positive.encode(weight, 1 if stored else 0)
    assert bool((steps > 0).all())
    assert int(unpack_codes(found, 4, 40).min()) == -7


def test_gptq_is_the_textbook_loop() -> None:
    """Column by column, with the inverse of what is left of the second moments (arXiv:2210.17323, equations 2 and 3)."""
    torch.manual_seed(3)
    form = BlockCodes(4, 16)
    weight, x = torch.randn(5, 40), torch.randn(60, 40) @ torch.randn(40, 40)
    second = (x.T @ x).double()
    codes, grid = gptq(form, weight, second)
    scale = grid.scale
    assert torch.equal(scale, searched_grid(form, weight, second.diagonal().float()).scale)
    left, expected = weight.double(), torch.zeros_like(codes)
    damped = second + DAMPING * second.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    waiting = sorted(range(40), key=lambda column: -float(second[column, column]))
    while waiting:
        inverse = torch.linalg.inv(damped[waiting][:, waiting])
        column = waiting[0]
        step = scale[:, column // 16].double()
        expected[:, column] = torch.clamp(torch.round(left[:, column] / step), -8, 7)
        lost = (left[:, column] - expected[:, column] * step) / inverse[0, 0]
        left[:, waiting] -= lost[:, None] * inverse[0]
        waiting = waiting[1:]
    assert torch.equal(codes, expected)
    plain, steps = nearest(weight, 16)
    errors = [
        relative_error(x @ (form.decode(form.stored(found, by), weight.shape, 0)).T, x @ weight.T)
        for found, by in ((codes, grid), (plain, CodeGrid(steps)))
    ]
    assert errors[0] < 0.8 * errors[1]
    nothing = torch.zeros(40, 40, dtype=torch.float64)  # no input was seen: the nearest codes
    found, by = gptq(form, weight, nothing)
    assert torch.equal(found, form.nearest(weight, by))


def test_searched_scales_are_the_best_of_the_shares() -> None:
    form, weight, importance = BlockCodes(4, 16), torch.randn(3, 32), torch.rand(32)
    scale = searched_grid(form, weight, importance).scale
    widest = form.widest(weight).scale
    for row in range(3):
        for block in range(2):
            values, weights = weight[row, 16 * block :][:16], importance[16 * block :][:16]
            tried = [float(widest[row, block]) * (1 - 0.025 * step) for step in range(11)]
            errors = [
                float(((torch.clamp(torch.round(values / step), -8, 7) * step - values) ** 2 * weights).sum())
                for step in tried
            ]
            assert float(scale[row, block]) == pytest.approx(tried[errors.index(min(errors))], rel=1e-6)


def test_calibrated_codes_move_outputs_less_and_replay(
    decoder: Program, calibration: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    passes = {
        method: Quantize("int4", method=method, group=64, embeddings=8, site_drift=1.0)
        for method in ("rtn", "gptq")
    }
    done = {
        method: bg.Pipeline([item]).run(decoder, calibration=calibration, max_drift=1.0)
        for method, item in passes.items()
    }
    moved = {
        method: sum(
            relative_error(program(**batch)["output"], decoder(**batch)["output"]) for batch in calibration
        )
        for method, program in done.items()
    }
    assert moved["gptq"] < 0.9 * moved["rtn"]
    last = done["gptq"].history[-1]
    assert {edit.site for edit in last.edits} >= {"embed.weight", "blocks.0.q.weight", "blocks.1.down.weight"}
    assert sum(edit.site == "embed.weight" for edit in last.edits) == 2  # its rows, and the head's codes
    assert all(", its output moved by 0." in edit.what for edit in last.edits if "gptq" in edit.what)
    assert not any(name in done["gptq"].parameters for name in ("embed.weight", "head.weight"))
    done["gptq"].save(tmp_path / "saved")
    again = bg.load(tmp_path / "saved")
    batch = tokens(2, 7)
    assert torch.equal(again(**batch)["output"], done["gptq"](**batch)["output"])
    replayed = bg.replay(tmp_path / "saved", decoder, calibration=calibration)
    assert all(torch.equal(replayed.parameters[name], value) for name, value in again.parameters.items())
    with pytest.raises(ResourceError, match="the resource 'calibration', which was not given"):
        bg.Pipeline([passes["gptq"]]).run(decoder)


def test_an_engine_reads_codes(decoder: Program, tmp_path: Path) -> None:
    import onnx

    engine = bg.compile(decoder, [Quantize("int4", embeddings=8)], backend="onnx", max_drift=1.0)
    engine.save(tmp_path / "engine")
    nodes = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False).graph.node
    products = [node for node in nodes if node.op_type == "MatMulNBits"]
    given = [{item.name: item.i for item in node.attribute} for node in products]
    assert len(given) == 13
    assert all((item["bits"], item["block_size"], item["accuracy_level"]) == (4, 32, 4) for item in given)
    assert {(item["K"], item["N"]) for item in given} == {(48, 48), (48, 64), (64, 48), (48, 50)}
    assert sum(node.op_type == "GatherBlockQuantized" for node in nodes) == 2
    assert not {node.op_type for node in nodes} & {"MatMul", "DequantizeLinear", "Gemm"}
    again, batch = bg.load(tmp_path / "engine"), tokens(2, 7, 3)
    program = bg.Pipeline([Quantize("int4", embeddings=8, activations="blocks")]).run(
        decoder, target=Target("onnx", ("blocks",), weight_scales=("channel", "block")), max_drift=1.0
    )
    assert relative_error(again(**batch)["output"], program(**batch)["output"]) < 1e-3
    with pytest.raises(InputError, match="ids"):
        again(ids=torch.tensor([[3, 50]]), attention_mask=torch.ones(1, 2, dtype=torch.int64))


def test_what_has_no_kernel_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match="elsewhere takes no weights with one scale for each block"):
        bg.Pipeline([Quantize("int4")]).run(program, target=Target("elsewhere"))
    with pytest.raises(PassError, match="elsewhere takes static, dynamic, none activations, not blocks"):
        bg.Pipeline([Quantize("int4", activations="blocks")]).run(program, target=Target("elsewhere"))
    masked = bg.Pipeline([Quantize("int4", include=("head",)), Prune(include=("head",))]).run(
        program, max_drift=2.0
    )
    served = deployed(masked)
    assert not any(
        "mul" in str(node.target) for node in served.graph.nodes if node.meta.get("site") == "head.weight"
    )
    torch.testing.assert_close(
        served(**tokens())["logits"], masked(**tokens())["logits"]
    )  # zeros are in the codes
    changed = bg.Pipeline([Quantize("int4", include=("head",))]).run(program, max_drift=2.0)
    with changed.edit() as editor:
        weight = next(node for node in editor.graph.nodes if "dequantize_blocks" in str(node.target))
        head = next(iter(weight.users))
        head.update_arg(1, editor.call(torch.ops.aten.abs.default, weight, like=head))
    with pytest.raises(
        BackendError,
        match=r"head.weight: its weight is in 4-bit codes, which aten.abs.default reads as numbers",
    ):
        read_block_codes(deployed(changed))


def test_options_that_do_not_fit_are_refused() -> None:
    for options, said in (
        ({"activations": "static"}, "int4 takes blocks or none"),
        ({"method": "best"}, "choose one of rtn, mse, hqq, awq, gptq, quantease"),
        ({"group": 48}, "kernels have groups of 16, 32, 64, 128, 256"),
        ({"embeddings": 2}, "give the bits of a code, 8 or 4"),
    ):
        with pytest.raises(InputError, match=said):
            Quantize("int4", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="int8 has rtn and mse"):
        Quantize("int8", method="gptq")
    with pytest.raises(InputError, match="int8 takes static or dynamic or none"):
        Quantize("int8", activations="blocks")


def test_a_tied_head_stays_with_its_embedding(decoder: Program) -> None:
    done = bg.Pipeline([Quantize("int4")]).run(decoder, max_drift=1.0)
    declined = {edit.site: edit.what for edit in done.history[-1].declined}
    assert "embeddings=8 quantizes both" in declined["embed.weight"]
    some = bg.Pipeline([Quantize("int4", embeddings=4, include=("blocks.*", "places"))]).run(
        decoder, max_drift=1.0
    )
    assert {"places.weight_rows_codes", "embed.weight"} <= set(some.parameters)


def test_wrong_codes_are_named(program: Program) -> None:
    small = bg.Pipeline([Quantize("int4")]).run(program, max_drift=1.0)
    node = next(item for item in small.graph.nodes if "dequantize_blocks" in str(item.target))
    site = str(node.meta["site"])
    measure = WeightsMoved(0.5)
    measure.check(program, small, [(site, node)], ())
    for name, change, said in (
        ("codes", lambda value: value ^ 2, "a code is .* scales away"),
        ("scale", lambda value: value * 1.3, "its scale is too large|scales away"),
    ):
        wrong = small.clone()
        wrong.parameters[f"{site}_{name}"] = change(small.parameters[f"{site}_{name}"])
        with pytest.raises(VerificationError, match=f"{site}.*({said}|changed by)"):
            measure.check(program, wrong, [(site, node)], ())


def test_a_delta_that_reads_the_weight_is_computed_once() -> None:
    """DoRA divides by the norms of rows of the weight: these are constants, and the product still reads codes."""
    plain = bg.capture(nn.Linear(48, 32), (torch.randn(3, 48),))
    small = bg.Pipeline([Quantize("int4"), DoRA(r=2, targets=("*",))]).run(plain, max_drift=1.0)
    served = deployed(trained(small, size=0.1))
    x = torch.randn(5, 48)
    expected = served(input=x)["output"]
    assert read_block_codes(served) == 1
    assert relative_error(served(input=x)["output"], expected) < 1e-5


def test_deltas_sit_on_codes_and_are_merged_within_a_stated_error(program: Program) -> None:
    codes = bg.Pipeline([Quantize("int4", group=16)]).run(program, max_drift=1.0)
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("q",))]).run(codes), size=0.1)
    with pytest.raises(PassError, match=r"q.weight: its weight is int4 codes.*requantize=0.15"):
        bg.Pipeline([Merge()]).run(tuned)
    done = bg.Pipeline([Merge(requantize=0.2)]).run(tuned)
    assert "folded into int4 codes, which are 0." in done.history[-1].edits[0].what
    old, a, b = (tuned.parameters[f"blocks.0.q.weight{end}"] for end in ("_codes", "_lora_a", "_lora_b"))
    stored = Encoded(old, tuned.parameters["blocks.0.q.weight_scale"])
    weight = BlockCodes(4, 16).decode(stored, torch.Size((32, 32)), 0)
    expected, scale = nearest(weight + 8 * b @ a, 16)
    assert torch.equal(unpack_codes(done.parameters["blocks.0.q.weight_codes"], 4, 32), expected)
    torch.testing.assert_close(done.parameters["blocks.0.q.weight_scale"], scale)
