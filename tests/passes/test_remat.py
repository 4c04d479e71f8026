"""Remat: bit-equal losses and gradients with less memory, random operators once, budgets that hold, and its place before ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import InputError, OrderError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.ops.traits import is_random
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import StepPass
from bmgraph.pass_manager.run_settings import Verify
from bmgraph.passes import Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from bmgraph.training.step_program import StepProgram
from tests.helpers.live_bytes import measured_peak
from tests.helpers.ranks import run_ranks
from tests.helpers.training import captured_to_train, labelled


class Block(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        added: torch.Tensor = x + self.down(self.drop(hidden) * torch.sigmoid(hidden))
        return added


class Stack(nn.Module):
    def __init__(self, drop: float = 0.0, layers: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(16, 16)
        self.layers = nn.ModuleList(Block(drop) for _ in range(layers))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.head(x)
        for layer in self.layers:
            x = layer(x)
        return {"loss": nn.functional.mse_loss(x, labels)}


ROWS = 200


def rows(count: int = ROWS, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(count, 16, generator=generator) for key in ("x", "labels")}


@cache
def captured(drop: float) -> Program:
    torch.manual_seed(0)
    return bg.capture(Stack(drop), rows())


def trainer_of(
    *passes: StepPass, drop: float = 0.0, verify: Verify = "structure", in_backward: bool = False
) -> Trainer:
    backend = Torch(optimizer=SGD(lr=0.1), optimizer_in_backward=in_backward)
    made: Trainer = bg.compile(captured(drop).clone(), passes=passes, backend=backend, verify=verify)
    return made


def counts(trainer: Trainer, name: str) -> int:
    return sum(name in str(node.target) for node in trainer.state.graph.nodes)


def test_losses_and_gradients_are_bit_equal_with_less_memory() -> None:
    plain = trainer_of()
    expected = [plain.step(rows(seed=seed)).loss for seed in range(3)]
    peaks = [plain.plan.peak.total]
    for keep in ("auto", "layers"):
        trainer = trainer_of(Remat(keep), verify="numeric")
        assert [trainer.step(rows(seed=seed)).loss for seed in range(3)] == expected
        for name, value in plain.state.tensors.items():
            assert torch.equal(trainer.state.tensors[name], value), (keep, name)
        peaks.append(trainer.plan.peak.total)
        assert peaks[-1] == pytest.approx(measured_peak(trainer, rows()), rel=0.04)
    assert peaks[0] > 1.25 * peaks[1] > 1.5 * peaks[2]


def test_auto_computes_no_products_again_and_layers_all() -> None:
    plain = trainer_of()
    products = counts(plain, "mm.default")
    assert counts(trainer_of(Remat("auto")), "mm.default") == products
    # the last product of a layer is read by forward alone
    assert counts(trainer_of(Remat("layers")), "mm.default") == products + 4


@pytest.mark.parametrize("keep", ["auto", pytest.param("layers", marks=pytest.mark.slow)])
def test_random_operators_run_once(keep: str) -> None:
    plain, trainer = trainer_of(drop=0.5), trainer_of(Remat(keep), drop=0.5)
    assert counts(trainer, "native_dropout.default") == counts(plain, "native_dropout.default") == 4
    for seed in range(2):
        assert trainer.step(rows(seed=seed)).loss == plain.step(rows(seed=seed)).loss
    assert trainer.plan.activations < plain.plan.activations


@pytest.mark.slow
def test_attention_without_dropout_is_computed_again() -> None:
    """Its kernels are tagged as random, whatever their probability of dropout is."""
    program, batch = captured_to_train("llama"), labelled("llama", 4, 8)
    plain, again = (
        bg.compile(program.clone(), passes=passes, backend=Torch(optimizer=SGD(lr=0.1)))
        for passes in ([], [Remat("layers")])
    )
    assert counts(again, "attention_for_cpu.default") == 2 * counts(plain, "attention_for_cpu.default") == 4
    assert again.step(batch).loss == plain.step(batch).loss
    kernel = next(node for node in plain.state.graph.nodes if "attention_for_cpu.default" in str(node.target))
    assert not is_random(kernel)
    kernel.kwargs = {"dropout_p": 0.1}
    assert is_random(kernel)


def test_a_pass_that_runs_random_operators_twice_is_stopped() -> None:
    with pytest.raises(VerificationError, match="random"):
        trainer_of(Planted(), drop=0.5)


@dataclass(frozen=True, repr=False)
class Planted(StepPass):
    """Lets the last reader of a dropout read another one."""

    def run(self, step: StepProgram, context: Context) -> StepProgram:
        drop = next(node for node in step.graph.nodes if "dropout" in str(node.target))
        item = next(iter(drop.users))
        reader = list(item.users)[-1]
        with step.graph.inserting_before(reader):
            again = step.graph.node_copy(drop, lambda node: node)
            copied = step.graph.node_copy(item, lambda node: again)
        reader.replace_input_with(item, copied)
        context.edited("dropout", "doubled")
        return step


@pytest.mark.slow
def test_a_budget_is_met_by_the_fewest_layers() -> None:
    most, auto, least = (
        trainer_of(*passes).plan.peak.total for passes in ([], [Remat("auto")], [Remat("layers")])
    )
    assert not trainer_of(Remat(f"{most}B")).report.records[-1].edits
    assert trainer_of(Remat(f"{auto}B")).report.records[-1].edits[0].site == "forward"
    half = trainer_of(Remat(f"{(auto + least) // 2}B"), ZeRO(3))
    assert half.plan.peak.total <= (auto + least) // 2
    assert half.report.records[0].edits[0].site in ("2 of 4 layers", "3 of 4 layers")
    with pytest.raises(PassError, match=r"peak of this rank is .* at best, above the budget of 1.0 KiB"):
        trainer_of(Remat("1KiB"))


def test_a_budget_knows_that_gradients_are_let_go() -> None:
    kept, taken = (trainer_of(in_backward=way).plan.peak.total for way in (False, True))
    assert taken < kept
    assert trainer_of(Remat(f"{taken}B"), in_backward=True).report.records[-1].edits == ()
    assert trainer_of(Remat(f"{taken}B")).report.records[-1].edits


def test_refusals_and_order() -> None:
    with pytest.raises(InputError, match="choose one of 'none', 'auto', 'layers', or a budget such as"):
        Remat("some")
    with pytest.raises(OrderError, match=r"passes=\[remat, zero\]"):
        trainer_of(ZeRO(3), Remat())
    assert trainer_of(Remat("none")).report.records[-1].edits == ()
    program = bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),))
    backend = Torch(optimizer=SGD(), loss=lambda outputs, inputs: outputs["output"].square().mean())
    with pytest.raises(PassError, match="no repeated layers were found"):
        bg.compile(program, passes=[Remat("layers")], backend=backend)
    assert (Remat("2GB").budget, Remat("1.5 MiB").budget) == (2 * 10**9, 3 * 2**19)


def _on_ranks(rank: int, size: int) -> dict[str, tuple[list[float], int, int]]:
    found = {}
    for keep in ("none", "auto", "layers"):
        trainer = trainer_of(Remat(keep), ZeRO(3))
        losses = [trainer.step(rows(seed=seed)).loss for seed in range(3)]
        found[keep] = losses, trainer.plan.peak.total, measured_peak(trainer, rows())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(precision: str) -> None:
    found = {}
    for keep in ("none", "auto", "layers"):
        backend = Torch(optimizer=AdamW(lr=1e-2), precision=precision)
        trainer = bg.compile(captured(0.0).clone(), passes=[Remat(keep), ZeRO(3)], backend=backend)
        found[keep] = [trainer.step(rows(seed=seed)).loss for seed in range(3)]
        assert trainer.plan.peak.total == pytest.approx(measured_peak(trainer, rows()), rel=0.1)
    assert found["none"] == found["auto"] == found["layers"]


@pytest.mark.slow
def test_with_zero_on_ranks() -> None:
    plain = trainer_of()
    expected = [plain.step(rows(seed=seed)).loss for seed in range(3)]
    for found in run_ranks(2, _on_ranks, 2):
        for keep, (losses, planned, measured) in found.items():
            assert losses == pytest.approx(expected, rel=1e-6), keep
            assert planned == pytest.approx(measured, rel=0.1), keep
        assert found["none"][1] > found["auto"][1] > found["layers"][1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_toy_models(name: str) -> None:
    program = captured_to_train(name).clone()
    program.example = labelled(name, 8, 24)
    found = {}
    for keep in ("none", "auto", "layers"):
        trainer = bg.compile(program, passes=[Remat(keep)], backend=Torch(optimizer=AdamW(lr=1e-3)))
        found[keep] = [trainer.step(program.example).loss for _ in range(3)], trainer.plan.peak.total
        assert found[keep][1] == pytest.approx(measured_peak(trainer, program.example), rel=0.1)
    assert found["none"][0] == found["auto"][0] == found["layers"][0]
    assert found["none"][1] > found["auto"][1] >= found["layers"][1]
