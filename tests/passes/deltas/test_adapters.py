"""Adapters: naive formulas by hooks on the model (outputs and gradients), exact when fresh, files, int8, engines, refusals."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import BundleError, InputError, OrderError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.ordering import check_order
from bmgraph.passes import (
    IA3,
    Adapter,
    ClassRows,
    Compacter,
    LoadDelta,
    LoRA,
    LowRankAdapter,
    Merge,
    ParallelAdapter,
    Prefix,
    Quantize,
    SoftTokens,
    known_passes,
)
from bmgraph.passes.deltas.bottleneck_pass import BottleneckPass
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import EXACT, stirred
from tests.helpers.sweep import sweep

Tensors = dict[str, torch.Tensor]

PASSES: tuple[BottleneckPass, ...] = (
    Adapter(4, activation="relu", scale=0.5),
    ParallelAdapter(4, activation="tanh"),
    LowRankAdapter(8, 2, activation="silu"),
    Compacter(8, 2),
)


def _compacted(t: Tensors, end: str) -> torch.Tensor:
    left, right = t[f"{end}_left"], t[f"{end}_right"]
    return sum((torch.kron(a, b @ c) for a, b, c in zip(t["rule"], left, right)), torch.zeros(()))


MATRICES: dict[str, Callable[[Tensors, str], torch.Tensor]] = {
    "adapter": lambda t, end: t[end],
    "parallel_adapter": lambda t, end: t[end],
    "low_rank_adapter": lambda t, end: t[f"{end}_left"] @ t[f"{end}_right"],
    "compacter": _compacted,
}
ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu, "tanh": torch.tanh, "silu": nn.functional.silu, "gelu": nn.functional.gelu,
}  # fmt: skip


def naive(model: TinyEncoder, program: Program, item: BottleneckPass) -> tuple[nn.Module, Tensors]:
    """The model with hooks that add adapters made of the program's parameters, and these parameters."""
    model = copy.deepcopy(model).requires_grad_(False)
    modules = dict(model.named_modules())
    trained: Tensors = {}
    for delta in deltas_of(program.graph):
        names = {key: str(node.target) for key, node in delta.tensors.items()}
        for name in names.values():
            if name not in trained:
                trained[name] = program.parameters[name].clone().requires_grad_()
        t = {key: trained[name] for key, name in names.items()}
        path = delta.site.removesuffix(".weight")
        before = modules[path.rpartition(".")[0] + (".q" if path.endswith(".o") else ".up")]
        kept: list[torch.Tensor] = []
        before.register_forward_hook(lambda _, args, out, kept=kept: kept.append(args[0]))

        def hook(
            _: Any,
            args: Any,
            y: torch.Tensor,
            t: Tensors = t,
            kept: list[torch.Tensor] = kept,
            family: str = delta.family.name,
        ) -> Any:
            read = kept.pop() if family == "parallel_adapter" else y
            inner = ACTIVATE[item.activation](read @ MATRICES[family](t, "down").T + t["down_bias"])
            return y + item.scale * (inner @ MATRICES[family](t, "up").T + t["up_bias"])

        modules[path].register_forward_hook(hook)
    return model, trained


QUICK = [PASSES[1], PASSES[3]]


class Tuned(dict[str, Program]):
    """Programs with a trained adapter by the name of their pass, made when they are asked for."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def __missing__(self, name: str) -> Program:
        item = next(item for item in PASSES if item.name == name)
        self[name] = stirred(bg.Pipeline([item]).run(self.program))
        return self[name]


@pytest.fixture(scope="module")
def tuned(program: Program) -> dict[str, Program]:
    return Tuned(program)


@pytest.mark.parametrize("item", sweep(PASSES, QUICK), ids=lambda item: item.name)
def test_it_is_the_naive_one(item: BottleneckPass, tuned: dict[str, Program], model: TinyEncoder) -> None:
    program = tuned[item.name]
    by_hand, trained = naive(model, program, item)
    assert set(trained) == set(program.parameters) - program.frozen
    batch = tokens(2, 6, 3)
    expected = by_hand(**batch)["logits"]
    assert relative_error(program(**batch)["logits"], expected.detach()) < EXACT
    expected.square().sum().backward()
    module = program.module()
    for name, value in module.named_parameters():
        value.requires_grad_(name in trained)
    outputs = dict(zip((spec.name for spec in program.outputs), module(*batch.values())))
    outputs["logits"].square().sum().backward()
    for name, value in module.named_parameters():
        if name in trained:
            assert relative_error(value.grad, trained[name].grad) < EXACT, name


@pytest.mark.parametrize("item", sweep(PASSES, QUICK[1:]), ids=lambda item: item.name)
def test_a_fresh_one_changes_nothing_and_files_keep_it(
    item: BottleneckPass, tuned: dict[str, Program], program: Program, tmp_path: Path
) -> None:
    fresh, trained = bg.Pipeline([item]).run(program), tuned[item.name]
    assert torch.equal(fresh(**tokens())["logits"], program(**tokens())["logits"])
    assert fresh.structure().roles == program.structure().roles
    assert {delta.site.rpartition(".")[0][-1] for delta in deltas_of(fresh.graph)} == {"o", "n"}
    trained.save_delta(str(tmp_path / "d"))
    assert sum(file.stat().st_size for file in (tmp_path / "d").iterdir()) < 20_000
    again = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})
    assert torch.equal(again(**tokens())["logits"], trained(**tokens())["logits"])
    assert again.frozen == trained.frozen
    assert set(again.parameters) == set(trained.parameters)
    with pytest.raises(
        PassError,
        match=f"a delta of the family '{deltas_of(again.graph)[0].family.name}' is no change of a weight",
    ):
        bg.Pipeline([Merge()]).run(again)


@pytest.mark.parametrize("last", [True, False])
def test_an_order_without_a_delta_to_merge_is_refused_before_it_runs(last: bool) -> None:
    """Another order is not offered, nor another adapter to put first."""
    for item in (*PASSES, Prefix(2), SoftTokens((1,)), ClassRows(((1,), (2,)))):
        order = [item, Merge()] if last else [Merge(), item]
        with pytest.raises(
            OrderError, match="pass merge requires delta, which nothing before it provides"
        ) as caught:
            check_order(order, known=known_passes().values)
        offered = str(caught.value).partition("put one of these before it: ")[2].split(", ")
        assert "LoRA" in offered
        assert type(item).__name__ not in offered


def test_no_order_is_offered_that_a_folder_would_fail(tmp_path: Path) -> None:
    """What is loaded may be no change of a weight: then merging behind it is no better."""
    program = bg.capture(nn.Sequential(nn.Linear(6, 4)), {"input": torch.randn(3, 6)})
    for name, item, offered in (
        ("adapter", Adapter(2, targets=("*",)), False), ("lora", LoRA(2, targets=("*",)), True),
    ):  # fmt: skip
        bg.Pipeline([item]).run(program).save_delta(str(tmp_path / name))
        with pytest.raises(OrderError, match="pass merge requires delta") as caught:
            bg.Pipeline([Merge(), LoadDelta("d")]).run(program, resources={"d": tmp_path / name})
        assert ("try this order" in str(caught.value)) == offered


def test_the_rewritten_graph_is_golden() -> None:
    program = bg.capture(nn.Linear(6, 4), {"input": torch.randn(3, 6)})
    tuned = bg.Pipeline([Adapter(2, targets=("*",), scale=2.0)]).run(program)
    stamp = "pass=adapter{bottleneck=2,targets=[*],scale=2.0}"
    delta = f"  # site=weight part=delta.adapter {stamp}"
    assert str(tuned) == (
        "forward(input: f32[batch, 6]):\n"
        "  %linear = aten.linear(%input, weight, bias) : f32[batch, 4]\n"
        f"  %linear_1 = aten.linear(%linear, weight_adapter_down, weight_adapter_down_bias) : f32[batch, 2]{delta}\n"
        f"  %gelu = aten.gelu(%linear_1) : f32[batch, 2]{delta}\n"
        f"  %linear_2 = aten.linear(%gelu, weight_adapter_up, weight_adapter_up_bias) : f32[batch, 4]{delta}\n"
        f"  %mul = aten.mul.Tensor(%linear_2, 2.0) : f32[batch, 4]{delta}\n"
        f"  %add = aten.add.Tensor(%linear, %mul) : f32[batch, 4]  # site=weight part=delta.adapter.total {stamp}\n"
        "  return output=%add\n"
    )


def test_places_and_two_families_at_once(program: Program) -> None:
    behind = bg.Pipeline([Adapter(2, place="pfeiffer")]).run(program)
    assert {delta.site for delta in deltas_of(behind.graph)} == {
        "blocks.0.down.weight",
        "blocks.1.down.weight",
    }
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    both = stirred(bg.Pipeline([LoRA(r=2), ParallelAdapter(2), IA3(), Adapter(2)]).run(codes))
    assert {delta.family.name for delta in deltas_of(both.graph)} == {
        "lora",
        "parallel_adapter",
        "ia3",
        "adapter",
    }
    assert relative_error(both(**tokens())["logits"], codes(**tokens())["logits"]) > 0.01


def test_a_wrong_one_does_not_pass(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    from bmgraph.deltas.adapter import AdapterFamily

    real = AdapterFamily.matrices

    def swapped(self: AdapterFamily, call: Any, tensors: Any) -> Any:
        down, up = real(self, call, tensors)
        return call(torch.ops.aten.neg.default, down), up

    monkeypatch.setattr(AdapterFamily, "matrices", swapped)
    with pytest.raises(
        VerificationError, match="with random values a delta is not what the family 'adapter' computes"
    ):
        bg.Pipeline([Adapter(2)]).run(program)


def test_what_does_not_fit_is_told(program: Program, tuned: dict[str, Program], tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"head.*it does not end an attention or a feed-forward"):
        bg.Pipeline([ParallelAdapter(2, targets=("head",))]).run(program)
    with pytest.raises(PassError, match="its 32 outputs are no multiple of division=5"):
        bg.Pipeline([Compacter(division=5)]).run(program)
    for make in (lambda: Adapter(0), lambda: Compacter(rank=0), lambda: Adapter(scale=0.0)):
        with pytest.raises(InputError, match="give a number"):
            make()
    tuned["compacter"].save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    config = tmp_path / "d" / "adapter_config.json"
    text = json.loads(config.read_text())
    config.write_text(json.dumps({**text, "options": {"activation": "sine"}}))
    with pytest.raises(BundleError, match="activation='sine': expected one of relu, gelu, silu, tanh"):
        bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})


def test_a_block_reads_what_the_adapter_of_the_one_before_changed() -> None:
    """Feed-forwards in a row, with nothing between: the input of the second is the changed output of the first."""
    blocks = [(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2)]
    model = nn.Sequential(*blocks[0], *blocks[1])
    x = torch.randn(3, 5, 8)
    tuned = stirred(bg.Pipeline([ParallelAdapter(2, activation="relu")]).run(bg.capture(model, (x,))))
    assert {delta.site for delta in deltas_of(tuned.graph)} == {"2.weight", "5.weight"}
    given = {tuned.inputs[0].name: x}
    y = x
    for first, last in ((0, 2), (3, 5)):
        t = {
            key: tuned.parameters[f"{last}.weight_parallel_adapter_{key}"]
            for key in ("down", "down_bias", "up", "up_bias")
        }
        y = model[first : last + 1](y) + (y @ t["down"].T + t["down_bias"]).relu() @ t["up"].T + t["up_bias"]
    assert relative_error(tuned(**given)["output"], y.detach()) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("item", PASSES, ids=lambda item: item.name)
def test_it_goes_to_an_engine(item: BottleneckPass, tuned: dict[str, Program]) -> None:
    pytest.importorskip("onnxruntime")
    program = tuned[item.name]
    engine = bg.compile(program, backend="onnx")
    batch = tokens(2, 6, 3)
    assert relative_error(torch.as_tensor(engine(**batch)["logits"]), program(**batch)["logits"]) < 1e-4
