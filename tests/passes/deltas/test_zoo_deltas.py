"""Each family of deltas on every zoo architecture: exact when fresh, roles kept, every tensor of it learns; what has no sites for it
is declined with the reason."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.passes import IA3, Adapter, BitFit, Compacter, DoRA, LowRankAdapter, ParallelAdapter, VeRA
from bmgraph.passes.deltas.delta_pass import DeltaPass
from tests.helpers.captured import NAMES, captured
from tests.helpers.peft_models import stirred
from tests.helpers.sweep import sweep

FAMILIES: tuple[DeltaPass, ...] = (
    DoRA(r=2), IA3(), BitFit(add=True), VeRA(r=4), Adapter(4), ParallelAdapter(4), LowRankAdapter(8), Compacter(8),
)  # fmt: skip

NO_ATTENTION = ("mamba", "mamba2")

DECLINED: dict[tuple[str, str], str] = {
    **{
        (name, item.name): "fits no role"
        for name in NO_ATTENTION
        for item in FAMILIES
        if not isinstance(item, BitFit)
    },
}
"""(architecture, family) -> why it is declined."""

QUICK = [("gpt2", FAMILIES[1])]


def test_each_family_trains_on_25_architectures_and_more() -> None:
    for item in FAMILIES:
        assert len(NAMES) - sum(name == item.name for _, name in DECLINED) >= 25


@pytest.mark.parametrize(
    ("name", "item"), sweep([(name, item) for name in NAMES for item in FAMILIES], QUICK)
)
def test_a_family_on_an_architecture(name: str, item: DeltaPass) -> None:
    _, program = captured(name)
    reason = DECLINED.get((name, item.name))
    if reason is not None:
        with pytest.raises(PassError, match=reason):
            bg.Pipeline([item]).run(program)
        return
    fresh = bg.Pipeline([item]).run(program)
    assert fresh.history[-1].drift == 0
    assert fresh.structure().roles == program.structure().roles
    tuned = stirred(fresh, 0.05)
    losses = [_loss_and_step(tuned, rate) for rate in (1e-5, 0.0)]
    assert losses[1] < losses[0]


def _loss_and_step(program: Program, rate: float) -> float:
    """The sum of squared outputs; each tensor that trains gets a gradient, and is moved along it."""
    module = program.module(training=True)
    values = module(*(program.example[spec.name] for spec in program.inputs))
    loss = sum(value.double().square().mean() for value in values if value.requires_grad)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    for name, item in module.named_parameters():
        trains = item.grad is not None and bool(item.grad.any())
        assert trains == (name not in program.frozen), name
        if trains:
            assert item.grad is not None
            step = item.grad * (rate / item.grad.norm() * item.numel() ** 0.5)
            program.parameters[name] = (program.parameters[name] - step).detach()
    return float(loss.detach())
