"""L0: gates that the loss trains to a share of closed ones, and their removal, which changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BundleError, InputError, OrderError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import L0, Distill, LoRA, Prune, Quantize, Shrink, ZeRO
from bmgraph.runtime.training.step_rules import GateRunner
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.utils.hard_concrete import MOST
from tests.helpers.bundles import edit_json
from tests.helpers.captured import captured
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.ranks import run_ranks
from tests.helpers.zoo import BY_NAME

USELESS = ((0, 2), (1, 3))
"""By block, the heads that nothing reads."""


def model() -> nn.Module:
    found = tiny_encoder(1)
    for module in found.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for block, heads in zip(found.blocks, USELESS):
            for head in heads:
                block.o.weight[:, head * 8 : (head + 1) * 8] = 0
    return found


def data() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 8, seed) for seed in range(4)]


def with_gates(program: Program, values: dict[str, list[float]]) -> Program:
    """The program with other log alphas, by site; the others stay open."""
    found = program.clone()
    for name, value in values.items():
        found.parameters[f"{name}_log_alpha"] = torch.tensor(value)
    return found


def gate(log_alpha: torch.Tensor, noise: float = 0.0) -> torch.Tensor:
    """The formula of Louizos et al., with their constants."""
    return (torch.sigmoid((log_alpha + noise) / (2 / 3)) * 1.2 - 0.1).clamp(0, 1)


def test_gates_scale_heads_and_neurons_and_their_removal_changes_nothing() -> None:
    source = bg.capture(model(), tokens(4, 8))
    gated = bg.Pipeline([L0(heads=0.5, ffn=0.5)]).run(source)
    assert gated.structure().roles == source.structure().roles
    batch = tokens(5, 7, seed=9)
    assert torch.equal(gated(**batch)["logits"], source(**batch)["logits"])
    heads = torch.tensor([-3.0, 0.4, -0.7, 3.0])
    neurons = torch.linspace(-4, 3, 64)
    closed = with_gates(
        gated, {"blocks.0.o.weight": heads.tolist(), "blocks.1.down.weight": neurons.tolist()}
    )
    naive = model()
    with torch.no_grad():
        naive.blocks[0].o.weight *= gate(heads).repeat_interleave(8)
        naive.blocks[1].down.weight *= gate(neurons)
    expected = naive.eval()(**batch)["logits"]
    assert torch.allclose(closed(**batch)["logits"], expected, atol=1e-5)
    shrunk = bg.Pipeline([Shrink(score="gates")]).run(closed)
    assert torch.allclose(shrunk(**batch)["logits"], expected, atol=1e-5)
    assert shrunk.parameters["blocks.0.o.weight"].shape == (32, 8 * int((gate(heads) > 0).sum()))
    assert shrunk.parameters["blocks.1.up.weight"].shape == (int((gate(neurons) > 0).sum()), 32)
    assert not [name for name in shrunk.tensors() if "gate" in name or "alpha" in name]
    assert shrunk.step_rules == ()
    assert shrunk.lr_factors == {}


@pytest.mark.slow
def test_the_loss_trains_them_to_the_target() -> None:
    """Heads that are of no use go, and no others."""
    source = bg.capture(model(), tokens(4, 8))
    given = {"teacher": source, "text": data(), "trainer": Torch(optimizer=AdamW(lr=1e-3))}
    passes = [L0(heads=0.5), Distill(steps=300), Shrink(score="gates")]
    done = bg.Pipeline(passes).run(source, resources=given)
    assert [edit.what.split(":")[0] for edit in done.history[-1].edits] == ["2 of 4 heads"] * 2
    left = (done.parameters[f"blocks.{place}.o.weight"] for place in range(2))
    for block, weight, heads in zip(model().blocks, left, USELESS):
        kept = [head for head in range(4) if head not in heads]
        before = torch.cat([block.o.weight[:, head * 8 : (head + 1) * 8] for head in kept], 1)
        assert float((weight - before).norm() / before.norm()) < 0.2  # trained a little, and the same heads


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_the_target_is_met_where_all_are_of_use(share: float) -> None:
    source = bg.capture(model(), tokens(4, 8))
    given = {"teacher": source, "text": data(), "trainer": Torch(optimizer=AdamW(lr=1e-3))}
    done = bg.Pipeline([L0(ffn=share), Distill(steps=500)]).run(source, resources=given)
    (rule,) = done.step_rules
    gates = gate(torch.cat([done.parameters[name] for _, name in rule.gates]))
    assert float((gates == 0).float().mean()) == pytest.approx(share, abs=0.05)
    assert float((gates == 1).float().mean()) == pytest.approx(1 - share, abs=0.08)


def squares(
    outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs["logits"].square().sum(), torch.ones_like(outputs["logits"]).sum()


def trainer_of(program: Program, *passes: Any, **options: Any) -> Trainer:
    rule = options.pop("optimizer", SGD(lr=0.1))
    return bg.compile(program, passes=passes, backend=Torch(optimizer=rule, loss=squares, **options))


def test_one_step_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of log alpha is autograd's of the task's loss with the noise of the step, and of the Lagrangian."""
    gated = bg.Pipeline([L0(heads=0.5, rate=0.3, warmup=4, lr_ratio=2.0)]).run(
        bg.capture(model(), tokens(4, 8))
    )
    seen: dict[str, torch.Tensor] = {}
    drawn = GateRunner.add

    def watched(self: GateRunner, means: Any, step: int) -> None:
        seen.update({name: item.clone() for name, item in means.items() if "alpha" in name})
        self.multipliers = [-0.5, 0.25]
        drawn(self, means, step)
        seen["l"] = torch.tensor(self.multipliers)

    monkeypatch.setattr(GateRunner, "add", watched)
    trainer = trainer_of(gated)
    trainer.step(data()[0])
    after = trainer.program()
    names = sorted(name for name in gated.parameters if "alpha" in name)
    alphas = [gated.parameters[name].double().requires_grad_() for name in names]
    flat = torch.cat(alphas)
    opened = torch.sigmoid(flat - 2 / 3 * torch.log(torch.tensor(0.1 / 1.1, dtype=torch.double)))
    gap = 1 - opened.mean() - 0.5 / 4
    penalty = -0.5 * gap + 0.25 * gap.square()
    found = torch.autograd.grad(penalty, alphas)
    for name, alpha, slope in zip(names, alphas, found):
        expected = alpha - 0.1 * 2.0 * (slope + seen[name])
        assert torch.allclose(after.parameters[name].double(), expected, atol=1e-6)
        assert seen[name].abs().sum() > 0  # of the task
    assert seen["l"].tolist() == pytest.approx(
        [-0.5 + 0.3 * gap.item(), 0.25 + 0.3 * gap.item() ** 2], abs=1e-6
    )
    assert all(not tensor.any() for name, tensor in after.buffers.items() if "noise" in name)


def _trained(
    rank: int, folder: str, passes: tuple[Any, ...], first: int, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    trainer = trainer_of(bg.load(f"{folder}/gated"), *passes, optimizer=AdamW(lr=1e-3), **options)
    if first:
        trainer.load(f"{folder}/ckpt")
    for step in range(first, 8):
        trainer.step(data()[step % 4])
    found = {name: item for name, item in trainer.program().parameters.items() if "alpha" in name}
    return found | {"multipliers": torch.tensor([item.multipliers for item in trainer.rules.gates])}


@pytest.mark.slow
def test_any_trainer_and_a_checkpoint(tmp_path: Path) -> None:
    bg.Pipeline([L0(heads=0.5, ffn=0.3, warmup=2)]).run(bg.capture(model(), tokens(4, 8))).save(
        tmp_path / "gated"
    )
    whole = _trained(0, str(tmp_path), (), 0, {})
    trainer = trainer_of(bg.load(tmp_path / "gated"), optimizer=AdamW(lr=1e-3))
    for step in range(4):
        trainer.step(data()[step])
    trainer.save(tmp_path / "ckpt")
    runs = [_trained(0, str(tmp_path), (), 4, {}), _trained(0, str(tmp_path), (), 0, {"accumulate": 2})]
    for stage in (1, 3):
        runs += run_ranks(2, _trained, str(tmp_path), (ZeRO(stage),), 4 if stage == 1 else 0, {})
    for found in runs:
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.allclose(found[name], value, atol=2e-2 if "alpha" in name else 1e-3), name
    _trained(0, str(tmp_path), (), 0, {"precision": "bf16"})
    edit_json(
        tmp_path / "ckpt" / "manifest.json",
        lambda found: found["sections"]["gates"].update({"multipliers": [[1.0]]}),
    )
    with pytest.raises(BundleError):
        _trained(0, str(tmp_path), (), 4, {})


@pytest.mark.slow
def test_far_gates_come_back() -> None:
    gated = bg.Pipeline([L0(heads=0.5)]).run(bg.capture(model(), tokens(4, 8)))
    far = with_gates(gated, {"blocks.0.o.weight": [-50.0, 50.0, 0.0, 2.2]})
    trainer = trainer_of(far)
    trainer.step(data()[0])
    assert float(trainer.program().parameters["blocks.0.o.weight_log_alpha"].abs().max()) <= MOST + 0.1


NAMES = ("llama", "gpt2", "bert", "t5", "gemma2", "opt", "phi", "falcon", "mixtral")


def check_leaves_out_what_is_closed(name: str, program: Program, gated: Program) -> None:
    """`Shrink(score="gates")` of an architecture's program gives what its gates do, is smaller than without gates, and deploys."""
    shrunk = bg.Pipeline([Shrink(score="gates")]).run(gated)
    batch = BY_NAME[name].example(3, 9)
    for output, expected in gated(**batch).items():
        if expected.is_floating_point():
            assert torch.allclose(shrunk(**batch)[output], expected, atol=1e-4, rtol=1e-4), output
    assert sum(item.numel() for item in shrunk.parameters.values()) < sum(
        item.numel() for item in program.parameters.values()
    )
    engine = bg.compile(shrunk, backend="onnx")
    found = engine(**{spec.name: batch[spec.name] for spec in engine.inputs})
    for output, value in found.items():
        assert torch.allclose(value, shrunk(**batch)[output], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_architectures(name: str, tmp_path: Path) -> None:
    """Gates of any values: grouped keys, packed and transposed weights, gated feed-forwards, cross attention."""
    _, program = captured(name)
    gated = bg.Pipeline([L0(heads=0.5, ffn=0.5)]).run(program)
    values = gated.clone()
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in gated.parameters if key.endswith("_log_alpha")]:
        values.parameters[key] = 4 * torch.randn(gated.parameters[key].shape, generator=generator)
    check_leaves_out_what_is_closed(name, program, values)


def test_units_are_removed_by_their_weights_too() -> None:
    """Open gates are equal, and do not tell which of them are gone; of those left each still scales its own head."""
    program = bg.Pipeline([L0(heads=0.5)]).run(bg.capture(model(), tokens(4, 8)))
    closed = with_gates(program, {"blocks.0.o.weight": [0.4, 0.1, -0.7, 3.0]})
    shrunk = bg.Pipeline([Shrink(heads=0.25)]).run(closed)
    assert len(shrunk.parameters["blocks.0.o.weight_log_alpha"]) == 3
    silent = closed.clone()
    with torch.no_grad():
        for site, (first, _) in zip(("blocks.0.o.weight", "blocks.1.o.weight"), USELESS):
            silent.parameters[site][:, first * 8 : (first + 1) * 8] = (
                0  # by magnitude the first of two that nothing reads
            )
    batch = tokens(5, 7, seed=9)
    assert torch.allclose(shrunk(**batch)["logits"], silent(**batch)["logits"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [Quantize("int8"), Quantize("int8", activations="none"), Prune("2:4"), LoRA(r=2)], ids=str
)
def test_behind_other_passes(before: Any) -> None:
    """Codes and rounded inputs cannot be multiplied: a product with the gates stays there."""
    program = bg.Pipeline([before]).run(bg.capture(model(), tokens(4, 8)), calibration=data())
    gated = bg.Pipeline([L0(heads=0.5, ffn=0.5)]).run(program)
    closed = with_gates(
        gated,
        {
            "blocks.0.o.weight": [-3.0, 0.4, -0.7, 3.0],
            "blocks.1.down.weight": torch.linspace(
                -4, 3, 64 if not isinstance(before, Prune) else 16
            ).tolist(),
        },
    )
    shrunk = bg.Pipeline([Shrink(score="gates")]).run(closed)
    batch = tokens(5, 7, seed=9)
    assert torch.allclose(shrunk(**batch)["logits"], closed(**batch)["logits"], atol=1e-4)
    assert len(shrunk.structure().attentions) == 2
    assert shrunk.structure().attentions[0].heads == 3


@pytest.mark.slow
def test_it_is_saved_and_replayed(tmp_path: Path) -> None:
    source = bg.capture(model(), tokens(4, 8))
    given = {"teacher": source, "text": data(), "trainer": Torch(optimizer=AdamW(lr=1e-2))}
    passes = [L0(heads=0.5, warmup=5), Distill(steps=40), Shrink(score="gates"), Distill(steps=2)]
    done = bg.Pipeline(passes).run(source, resources=given)
    done.save(tmp_path / "done")
    again = bg.replay(tmp_path / "done", source, resources=given)
    assert all(torch.equal(item, again.parameters[name]) for name, item in done.parameters.items())
    gated = bg.Pipeline(passes[:1]).run(source)
    gated.save(tmp_path / "gated")
    assert bg.load(tmp_path / "gated").step_rules == gated.step_rules
    edit_json(
        tmp_path / "gated" / "program.json",
        lambda found: found["step_rules"][0].update({"gates": [["a", "b"]]}),
    )
    with pytest.raises(BundleError):
        bg.load(tmp_path / "gated")


def test_bad_options_are_refused() -> None:
    for options, message in (
        ({}, "give a share of neurons"),
        ({"heads": 1.0}, "heads=1.0: give a share to close"),
        ({"heads": 0.5, "rate": 0}, "rate above 0"),
        ({"heads": 0.5, "lr_ratio": -1}, "lr_ratio=-1"),
    ):
        with pytest.raises(InputError, match=message):
            L0(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the gates say what goes; leave ffn, heads"):
        Shrink(score="gates", ffn=0.5)


@pytest.mark.slow
def test_what_does_not_fit_is_refused() -> None:
    program = bg.capture(model(), tokens(4, 8))
    with pytest.raises(OrderError, match="gated"):
        bg.Pipeline([Shrink(score="gates")]).run(program)
    with pytest.raises(PassError, match="include='nowhere' fits no site"):
        bg.Pipeline([L0(heads=0.5, include=("nowhere",))]).run(program)
    gated = bg.Pipeline([L0(heads=0.5)]).run(program)
    with pytest.raises(InputError, match="leave optimizer_in_backward out"):
        trainer_of(gated, optimizer_in_backward=True)
    twice = bg.Pipeline([L0(heads=0.5, ffn=0.5)]).run(gated)
    assert {edit.what for edit in twice.history[-1].declined} == {"it has gates already"}


@pytest.mark.slow
def test_behind_codes_in_groups_another_order_is_offered() -> None:
    passes = [Quantize("int4", group=16), L0(heads=0.5)]
    with pytest.raises(
        OrderError, match=r"try this order: passes=\[l0\{heads=0.5\}, quantize\{scheme=int4,group=16\}\]"
    ):
        bg.Pipeline(passes).run(bg.capture(model(), tokens(4, 8)))


def test_hidden_channels_have_no_gates() -> None:
    options: dict[str, Any] = {"hidden": 0.25}
    with pytest.raises(
        InputError, match=r"'l0' has no option 'hidden': .*norms run over closed .*Shrink\(hidden="
    ):
        L0(**options)
