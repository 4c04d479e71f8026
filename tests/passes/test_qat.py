"""QAT: golden graph, training as a plain loop with LSQ does it, engines that multiply what was trained, what is declined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, OpenVINO, Torch
from bmgraph.backends.tensorrt.legalize import check_quantization
from bmgraph.errors import BackendError, InputError, OrderError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.ops.block_codes import unpack_codes
from bmgraph.ops.fake_quantization import nearest_codes
from bmgraph.passes import QAT, Distill, LoRA, Merge, MoEfy, Prune, Quantize, StoreCodes, ZeRO
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import enlarge, tiny_encoder, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.sweep import sweep
from tests.helpers.training import batches, captured_to_train

RATE = 1e-2
FORMS = [("int4", "blocks"), ("int8", "static"), ("int4", "none"), ("int8", "dynamic"), ("int2", "blocks")]


def calibration() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 12, seed) for seed in range(3)]


def squares(outputs: Mapping[str, torch.Tensor], inputs: Mapping[str, torch.Tensor]) -> Any:
    """How far hidden states are from 1, without padding."""
    kept = inputs["attention_mask"].float()
    return ((outputs["hidden"] - 1).square().sum(-1) * kept).sum(), kept.sum()


def trained(program: Program, steps: int = 3, **options: Any) -> Program:
    """The encoder after some steps."""
    trainer = bg.compile(program, [], backend=Torch(optimizer=AdamW(lr=RATE), loss=squares, **options))
    for step in range(steps):
        trainer.step(tokens(4, 12, step))
    return trainer.program()


@pytest.fixture(scope="module")
def encoder() -> Program:
    return bg.capture(tiny_encoder(), tokens())


@pytest.fixture(scope="module")
def done(encoder: Program) -> Callable[[str, str], Program]:
    """The encoder, trained in codes of a scheme; each is trained once."""
    known: dict[tuple[str, str], Program] = {}

    def made(scheme: str, activations: str) -> Program:
        if (scheme, activations) not in known:
            item = QAT(scheme, activations, group=16 if activations == "blocks" else None)
            begun = bg.Pipeline([item]).run(encoder, calibration=calibration(), max_drift=2.0)
            known[scheme, activations] = trained(begun)
        return known[scheme, activations]

    return made


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(40, 24), {"input": torch.randn(3, 40)})
    rounded = bg.Pipeline([QAT("int4", activations="blocks")]).run(program)
    stamp = "# site=weight part={} pass=qat{{scheme=int4,activations=blocks}}"
    assert str(rounded) == (
        "forward(input: f32[batch, 40]):\n"
        "  %fake_quantize_blocks = bmgraph.fake_quantize_blocks(weight, weight_step, 0, 32, -8, 7) : f32[24, 40]  "
        f"{stamp.format('weight')}\n"
        f"  %quantize_blocks = bmgraph.quantize_blocks(%input, 32) : f32[batch, 40]  {stamp.format('activation')}\n"
        "  %linear = aten.linear(%quantize_blocks, %fake_quantize_blocks, bias) : f32[batch, 24]\n"
        "  return output=%linear\n"
    )
    assert rounded.structure().roles == program.structure().roles
    small = bg.Pipeline([StoreCodes()]).run(rounded)
    assert "bmgraph.dequantize_blocks(weight_codes, weight_scale, 4, 40)" in str(small)


class Rounded(nn.Module):
    """Two linears in int8, in plain PyTorch: LSQ for the weights of each output and for one scale of each input."""

    def __init__(self, model: nn.Sequential, program: Program) -> None:
        super().__init__()
        self.model = model
        self.steps = nn.ParameterDict(
            {
                name.replace(".", "_"): program.parameters[name].clone()
                for name in sorted(program.parameters)
                if name.endswith(("_step", "_input_scale"))
            }
        )
        self.zeros = {place: float(program.parameters[f"{place}.weight_input_zero"]) for place in (0, 2)}

    @staticmethod
    def lsq(
        x: torch.Tensor, step: torch.Tensor, zero: float, least: int, most: int, count: int
    ) -> torch.Tensor:
        factor = (count * most) ** -0.5
        step = (step - step * factor).detach() + step * factor
        codes = x / step
        codes = (codes.round() - codes).detach() + codes
        return ((codes + zero).clamp(least, most) - zero) * step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in (0, 2):
            linear, names = self.model[place], (f"{place}_weight_step", f"{place}_weight_input_scale")
            weight, size = linear.weight, linear.weight.shape[1]
            step, scale = (self.steps[name] for name in names)
            weight = self.lsq(weight, step[:, None], 0.0, -127, 127, size)
            x = self.lsq(x, scale, self.zeros[place], 0, 255, size)
            x = nn.functional.linear(x, weight, linear.bias)
            x = torch.tanh(x) if place == 0 else x
        return x


def test_training_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 16))
    given = [{"input": torch.randn(6, 32)} for _ in range(4)]
    program = bg.capture(model, given[0])
    item = QAT("int8", activations="static", method="rtn")
    program = bg.Pipeline([item]).run(program, calibration=given)
    plain = Rounded(model, program)
    rates = program.lr_factors
    assert set(rates) == {f"{place}.weight{end}" for place in (0, 2) for end in ("_step", "_input_scale")}
    step, weight = program.parameters["0.weight_step"], program.parameters["0.weight"]
    assert rates["0.weight_step"] == pytest.approx(
        float(step.mean() / weight.square().mean().sqrt()), rel=1e-5
    )
    groups = [{"params": list(model.parameters()), "lr": 1e-3}]
    groups += [
        {"params": [value], "lr": 1e-3 * rates[name.replace("_", ".", 1)]}
        for name, value in plain.steps.items()
    ]
    rule = torch.optim.AdamW(groups, weight_decay=0.0)

    def loss(outputs: Mapping[str, torch.Tensor], inputs: object) -> Any:
        value = outputs["output"].square()
        return value.sum(), torch.ones_like(value[:, 0]).sum()

    backend = Torch(optimizer=AdamW(lr=1e-3, weight_decay=0.0), loss=loss)
    trainer = bg.compile(program, [], backend=backend)
    for batch in (*given, given[0]):
        rule.zero_grad()
        expected = plain(batch["input"]).square().sum() / 6
        expected.backward()
        rule.step()
        assert trainer.step(batch).loss == pytest.approx(expected.item(), rel=1e-5)
    after = trainer.program().parameters
    for name, value in plain.steps.items():
        torch.testing.assert_close(after[name.replace("_", ".", 1)], value.detach(), rtol=1e-4, atol=1e-7)
    moved = (after["0.weight_step"] - step).abs().max()
    assert float(moved) > 1e-6


@pytest.mark.parametrize(("scheme", "activations"), sweep(FORMS, FORMS[:2]))
def test_engines_multiply_what_was_trained(
    scheme: str, activations: str, done: Callable[[str, str], Program], tmp_path: Path
) -> None:
    import onnx

    program, batch = done(scheme, activations), tokens(3, 10, 9)
    expected = program(**batch)
    small = bg.Pipeline([StoreCodes()]).run(program)
    assert all(torch.equal(value, expected[name]) for name, value in small(**batch).items())
    assert not any(name.endswith("_step") for name in small.parameters if "input" not in name)
    site = "blocks.1.up.weight"
    weight, step = (program.parameters[f"{site}{end}"] for end in ("", "_step"))
    codes, columns = small.parameters[f"{site}_codes"], weight.shape[1]
    bits, block = int(scheme[3:]), 0 if scheme == "int8" else columns // step.shape[1]
    least, most = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    unpacked = codes if bits == 8 else unpack_codes(codes, bits, columns)
    assert torch.equal(unpacked, nearest_codes(weight, step, 0, block, least, most))
    assert torch.equal(small.parameters[f"{site}_scale"], step)
    engine = bg.compile(program, [], backend="onnx")
    found = engine(**batch)["hidden"]
    cosine = nn.functional.cosine_similarity(torch.as_tensor(found), expected["hidden"], dim=-1)
    assert float(cosine.min()) > 0.9995
    if activations == "none":  # else a last bit may cross a rounding step
        assert relative_error(torch.as_tensor(found), expected["hidden"]) < 1e-5
    engine.save(tmp_path / "engine")
    assert torch.equal(bg.load(tmp_path / "engine")(**batch)["hidden"], found)
    nodes = onnx.load(str(tmp_path / "engine" / "model.onnx"), load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("MatMulIntegerToFloat" if bits == 8 else "MatMulNBits") == 13
    assert not {"MatMul", "Gemm"} & set(kinds)
    if activations == "blocks":
        given = [item for node in nodes for item in node.attribute if item.name == "accuracy_level"]
        in_graph = (bits, block) == (2, 16)  # the kernel does not round there, so the graph does
        assert {item.i for item in given} == {1 if in_graph else 4}
        assert ("Round" in kinds) == in_graph


@pytest.mark.parametrize("backend", sweep(["onnx", "openvino"], ["onnx"]))
@pytest.mark.parametrize(("scheme", "activations"), FORMS[:2])
def test_an_engine_rounds_activations_as_training_does(scheme: str, activations: str, backend: str) -> None:
    """The weight is the identity, so outputs are codes of the input times their scale."""
    if backend == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model, size = nn.Linear(64, 64, bias=False), 16
    model.weight.data = torch.eye(64)
    given = {"input": torch.randn(512, 64)}
    item = QAT(scheme, activations, group=size if activations == "blocks" else None)
    program = bg.Pipeline([item]).run(bg.capture(model, given), calibration=[given], max_drift=2.0)
    expected, engine = program(**given)["output"], bg.compile(program, [], backend=backend)
    found = torch.as_tensor(engine(**given)["output"])
    if activations == "blocks":
        step = given["input"].reshape(512, -1, size).abs().amax(-1).repeat_interleave(size, 1) / 127
    else:
        step = program.parameters["weight_input_scale"].expand_as(found)
    apart = ((found - expected) / step).round().abs()
    assert float(apart.max()) <= 1
    assert float((apart == 0).float().mean()) >= 0.999
    assert bool(((expected / step).round().abs() > 5).any())


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "activations"), FORMS[:2])
def test_openvino_computes_what_was_trained(
    scheme: str, activations: str, done: Callable[[str, str], Program]
) -> None:
    pytest.importorskip("openvino")
    program, batch = done(scheme, activations), tokens(3, 10, 9)
    engine = bg.compile(program, [], backend=OpenVINO(precision="f32"))
    found, expected = torch.as_tensor(engine(**batch)["hidden"]), program(**batch)["hidden"]
    assert float(nn.functional.cosine_similarity(found, expected, dim=-1).min()) > 0.9995


@pytest.mark.slow
def test_tensorrt_takes_what_was_trained_around_zero(encoder: Program) -> None:
    centered = {"centered": True, "group": 32}
    for item in (
        QAT("int4", activations="none", **centered),  # type: ignore[arg-type]
        QAT("int8", activations="static", centered=True),
    ):
        program = bg.Pipeline([item]).run(encoder, calibration=calibration())
        check_quantization(deployed(program))
    other = bg.Pipeline([QAT("int8", activations="static")]).run(encoder, calibration=calibration())
    with pytest.raises(BackendError, match="to uint8 codes with zero point"):
        check_quantization(deployed(other))


@pytest.mark.slow
def test_experts_are_declined(encoder: Program) -> None:
    mixture = bg.Pipeline([MoEfy(experts=4, active=4)]).run(encoder, calibration=calibration())
    done = bg.Pipeline([QAT("int8", activations="none")]).run(mixture)
    reasons = {edit.what for edit in done.history[-1].declined}
    assert "experts do not train in codes: quantize them after training" in reasons
    assert done.history[-1].edits


def test_tables_that_are_asked_for_are_declined(encoder: Program) -> None:
    with pytest.raises(
        PassError,
        match=r"rows that are looked up do not train in codes: Quantize\(embeddings=8\) rounds them after",
    ):
        bg.Pipeline([QAT("int4", include=("embed",))]).run(encoder)
    (record,) = bg.Pipeline([QAT("int8", include=("embed", "*.down"))]).run(encoder).history
    assert [edit.site for edit in record.declined] == ["embed.weight"]
    assert {edit.site for edit in record.edits} == {"blocks.0.down.weight", "blocks.1.down.weight"}


@pytest.mark.slow
def test_one_list_trains_for_its_target() -> None:
    """The target says that activations are rounded by blocks; the model before is the teacher."""
    model = tiny_encoder()
    for block in model.blocks:
        block.drop.p = 0.0
    encoder = bg.capture(model, tokens())
    text = [tokens(8, 12, seed) for seed in range(30)]
    trainer = Torch(optimizer=AdamW(lr=1e-3, weight_decay=0.0))
    engine = bg.compile(
        encoder, [QAT("int4", group=32), Distill(steps=30, on="hidden")], backend="onnx",
        resources={"teacher": encoder, "text": text, "trainer": trainer},
    )  # fmt: skip
    first = engine.report.records[0]
    assert all("int4 weight, blocks activation, learned steps" in edit.what for edit in first.edits)
    rounded = bg.compile(encoder, [Quantize("int4", group=32)], backend="onnx")
    batch = tokens(8, 12, 77)
    errors = [
        relative_error(torch.as_tensor(item(**batch)["hidden"]), encoder(**batch)["hidden"])
        for item in (engine, rounded)
    ]
    assert errors[0] < 0.85 * errors[1]


class Stored(nn.Module):
    """A linear whose weight is stored [in, out]."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(features, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w


class Odd(nn.Module):
    """A weight stored [in, out], a linear that is used twice, packed queries, keys and values, and a tied table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32)
        self.packed, self.stored, self.twice = nn.Linear(32, 96), Stored(32, 32), nn.Linear(32, 32)
        self.tiny = nn.Linear(32, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.table(ids)
        q, k, v = (
            item.reshape(*ids.shape, 2, 16).transpose(1, 2) for item in self.packed(x).split(32, dim=-1)
        )
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = self.twice(torch.tanh(self.twice(self.stored(x))))
        return {"logits": x @ self.table.weight.T, "tiny": self.tiny(x)}


@pytest.mark.slow
def test_weights_in_other_forms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    enlarge(model)
    batch = {"ids": torch.randint(0, 40, (1, 7))}
    program = bg.capture(model, batch)

    def loss(outputs: Mapping[str, torch.Tensor], inputs: object) -> Any:
        return outputs["logits"].square().sum(), torch.tensor(7.0)

    for scheme in ("int4", "int8"):
        rounded = bg.Pipeline([QAT(scheme, activations="none")]).run(program, max_drift=1.0)
        record = rounded.history[-1]
        assert {edit.site for edit in record.edits} == {"packed.weight", "stored.w", "twice.weight"}
        why = {edit.site: edit.what for edit in record.declined}
        assert "Quantize(embeddings=8) rounds both after training" in why["table.weight"]
        assert "4 x 32, below smallest=16" in why["tiny.weight"]
        backend = Torch(optimizer=AdamW(lr=1e-3), loss=loss)
        trainer = bg.compile(rounded, [], backend=backend)
        losses = [trainer.step(batch).loss for _ in range(3)]
        assert losses[-1] < losses[0]
        after = trainer.program()
        small = bg.Pipeline([StoreCodes()]).run(after)
        assert torch.equal(small(**batch)["logits"], after(**batch)["logits"])
        if scheme == "int8":
            assert small.parameters["stored.w_codes"].shape == (32, 32)
        engine = bg.compile(after, [], backend="onnx")
        assert relative_error(torch.as_tensor(engine(**batch)["logits"]), after(**batch)["logits"]) < 1e-3
    both = bg.Pipeline([Quantize("int4", embeddings=8, activations="none")]).run(after, max_drift=1.0)
    trained_sites = {edit.site for edit in both.history[-1].edits if "trained with" in edit.what}
    assert trained_sites == {"packed.weight", "stored.w", "twice.weight"}
    assert {"table.weight_rows_codes", "table.weight_codes", "packed.weight_codes"} <= set(both.parameters)
    assert torch.equal(both.parameters["packed.weight_codes"], small.parameters["packed.weight_codes"])


def test_steps_do_not_decay_and_frozen_weights_keep_theirs(encoder: Program) -> None:
    item = QAT("int8", activations="none")
    rounded = bg.Pipeline([item]).run(encoder)
    name = "blocks.0.q.weight_step"
    assert name not in rounded.frozen
    trainer = bg.compile(
        rounded, [], backend=Torch(optimizer=AdamW(lr=1e-3, weight_decay=100.0), loss=squares)
    )
    trainer.step(tokens(4, 12, 1))
    after = trainer.program()
    moved = after.parameters[name] / rounded.parameters[name]
    assert float((moved - 1).abs().max()) < 0.01
    assert (
        float((after.parameters["blocks.0.q.weight"] / rounded.parameters["blocks.0.q.weight"]).median())
        < 0.95
    )
    fixed = bg.Pipeline([QAT("int8", activations="none", step="fixed")]).run(encoder)
    assert name in fixed.frozen
    assert not fixed.lr_factors
    frozen = encoder.clone()
    frozen.frozen |= {"blocks.0.q.weight"}
    kept = bg.Pipeline([item]).run(frozen)
    assert name in kept.frozen
    assert "blocks.0.k.weight_step" not in kept.frozen


@pytest.mark.slow
def test_it_is_saved_and_replayed(
    encoder: Program, done: Callable[[str, str], Program], tmp_path: Path
) -> None:
    program, batch = done("int8", "static"), tokens(2, 7, 5)
    program.save(tmp_path / "program")
    again = bg.load(tmp_path / "program")
    assert torch.equal(again(**batch)["hidden"], program(**batch)["hidden"])
    assert again.lr_factors == program.lr_factors
    more = trained(again, 1)
    assert not torch.equal(more.parameters["blocks.1.up.weight"], program.parameters["blocks.1.up.weight"])
    rounded = bg.Pipeline([QAT("int8", activations="static"), StoreCodes()]).run(
        encoder, calibration=calibration()
    )
    rounded.save(tmp_path / "rounded")
    replayed = bg.replay(tmp_path / "rounded", encoder, calibration=calibration())
    assert all(torch.equal(replayed.parameters[name], value) for name, value in rounded.parameters.items())


@pytest.mark.slow
def test_pruned_weights_stay_pruned_and_deltas_train_on_rounded_weights(encoder: Program) -> None:
    sparse = trained(bg.Pipeline([Prune("2:4"), QAT("int4", activations="none")]).run(encoder, max_drift=2.0))
    small = bg.Pipeline([StoreCodes()]).run(sparse)
    codes = unpack_codes(small.parameters["blocks.0.up.weight_codes"], 4, 32)
    assert int((codes.reshape(-1, 4) != 0).sum(1).max()) <= 2
    tuned = trained(
        bg.Pipeline([QAT("int8", activations="none"), LoRA(r=2, targets=("q", "v"))]).run(encoder)
    )
    assert torch.equal(
        tuned.parameters["blocks.0.q.weight_step"],
        bg.Pipeline([QAT("int8", activations="none")]).run(encoder).parameters["blocks.0.q.weight_step"],
    )
    batch = tokens(3, 9, 4)
    engine = bg.compile(tuned, [], backend="onnx")
    assert relative_error(torch.as_tensor(engine(**batch)["hidden"]), tuned(**batch)["hidden"]) < 1e-3


@pytest.mark.slow
def test_half_precision_trains_and_stores_the_numbers_that_it_computes() -> None:
    torch.manual_seed(0)
    model = tiny_encoder().to(torch.bfloat16)
    program = bg.Pipeline([QAT("int4", activations="none")]).run(bg.capture(model, tokens()), max_drift=2.0)
    after = trained(program, 2)
    assert after.parameters["head.weight_step"].dtype == torch.bfloat16
    batch = tokens(2, 6, 3)
    small = bg.Pipeline([StoreCodes()]).run(after)
    assert torch.equal(small(**batch)["hidden"], after(**batch)["hidden"])


def test_sites_have_codes_of_several_sizes(encoder: Program) -> None:
    items = [QAT("int8", activations="none", include=("*.q", "*.k")), QAT("int4", activations="none")]
    done = bg.Pipeline(items).run(encoder, max_drift=1.0)
    small = bg.Pipeline([StoreCodes()]).run(done)
    assert small.parameters["blocks.0.q.weight_codes"].dtype == torch.int8
    assert small.parameters["blocks.0.v.weight_codes"].dtype == torch.uint8
    assert {edit.site: edit.what for edit in done.history[-1].declined}["blocks.0.q.weight"] == (
        "it trains in codes already"
    )
    assert torch.equal(small(**tokens())["hidden"], done(**tokens())["hidden"])


def test_options_and_programs_that_do_not_fit_are_refused(encoder: Program) -> None:
    for options, said in (
        ({"step": "moving"}, "choose learned or fixed"),
        ({"scheme": "mixed"}, "bits are searched after training"),
        ({"method": "gptq"}, "int8 has rtn and mse"),
        ({"scheme": "int4", "activations": "static"}, "int4 takes blocks or none"),
        ({"scheme": "int9"}, "choose one of int8"),
        ({"group": 48, "scheme": "int4"}, "kernels have groups of"),
    ):
        with pytest.raises(InputError, match=said):
            QAT(**options)  # type: ignore[arg-type]
    with pytest.raises(ResourceError, match="the resource 'calibration', which was not given"):
        bg.Pipeline([QAT(activations="static")]).run(encoder)
    with pytest.raises(PassError, match="include='nowhere' fits no site"):
        bg.Pipeline([QAT(activations="none", include=("nowhere",))]).run(encoder)
    with pytest.raises(OrderError):
        bg.Pipeline([Quantize("int8", activations="none"), QAT()]).run(encoder)
    with pytest.raises(OrderError):
        bg.Pipeline([StoreCodes()]).run(encoder)
    with pytest.raises(PassError, match="onnx has no kernel for codes of 3 bits"):
        bg.compile(encoder, [QAT("int3", activations="none")], backend="onnx")


def _train(rank: int, saved: str) -> list[float]:
    backend = Torch(optimizer=AdamW(lr=RATE))
    trainer = bg.compile(bg.load(saved), passes=[ZeRO(3)], backend=backend)
    return [trainer.step(batch).loss for batch in batches("llama", 3)]


@pytest.mark.slow
def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    saved = str(tmp_path / "program")
    item = QAT("int4", activations="blocks", group=16)
    bg.Pipeline([item]).run(captured_to_train("llama"), max_drift=2.0).save(saved)
    (alone,) = [_train(0, saved)]
    for losses in run_ranks(2, _train, saved):
        assert losses == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_it_begins_with_codes_that_were_chosen_layer_by_layer(encoder: Program, method: str) -> None:
    options: Any = {"activations": "none", "method": method, "group": 16}
    rounded = bg.Pipeline([Quantize("int4", **options)]).run(encoder, calibration=calibration())
    begun = bg.Pipeline([QAT("int4", **options)]).run(encoder, calibration=calibration())
    batch = tokens(3, 9, 4)
    torch.testing.assert_close(begun(**batch)["hidden"], rounded(**batch)["hidden"], rtol=1e-5, atol=1e-5)
    small = bg.Pipeline([StoreCodes()]).run(begun)
    for name, value in rounded.parameters.items():
        if name.endswith("_codes"):
            assert float((small.parameters[name] == value).float().mean()) > 0.999
    assert set(begun.lr_factors) == {f"{edit.site}_step" for edit in begun.history[-1].edits}
    after = trained(begun)
    assert not torch.equal(after.parameters["blocks.0.up.weight"], begun.parameters["blocks.0.up.weight"])


@pytest.mark.slow
def test_a_delta_on_weights_that_train_in_codes_stays_unmerged(encoder: Program) -> None:
    tuned = bg.Pipeline([QAT("int8", activations="none"), LoRA(r=2, targets=("q",))]).run(encoder)
    with pytest.raises(PassError, match=r"blocks\.0\.q\.weight: its weight trains in codes"):
        bg.Pipeline([Merge()]).run(tuned)
