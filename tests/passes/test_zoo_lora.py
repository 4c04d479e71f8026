"""LoRA on every zoo architecture: exact when fresh, equal to naive LoRA when trained, trainable, roles unchanged."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.passes import LoRA
from tests.helpers.captured import NAMES, TOLERANCE, captured, distance
from tests.helpers.deltas import trained, weight_change

QUICK = ("bert", "gpt2", "llama", "t5")

NO_ATTENTION = ("mamba", "mamba2")


def tuned_linears(name: str) -> LoRA:
    """LoRA on queries and values (ranges where they are fused); without attention, on all linears except a tied head."""
    return LoRA(r=2, roles=("linear",)) if name in NO_ATTENTION else LoRA(r=2)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_lora_works(name: str) -> None:
    _, program = captured(name)
    fresh = bg.Pipeline([tuned_linears(name)]).run(program)
    assert fresh.history[-1].drift == 0
    assert fresh.history[-1].edits
    assert fresh.structure().roles == program.structure().roles
    tuned = trained(fresh, size=0.1)
    by_hand = program.clone()
    changed: set[tuple[str, str]] = set()
    for delta in deltas_of(tuned.graph):
        if (delta.site, delta.tensors["a"].name) in changed:
            continue  # another use of the same linear
        changed.add((delta.site, delta.tensors["a"].name))
        change = weight_change(tuned, delta)
        weight = by_hand.parameters[delta.site]
        stored = delta.linear.args[1].target is torch.ops.aten.t.default  # type: ignore[union-attr]
        by_hand.parameters[delta.site] = weight + (change.T if stored else change)
    found, before = tuned(**program.example), program(**program.example)
    for key, value in by_hand(**program.example).items():
        assert distance(found[key], value) < TOLERANCE, key
    assert any(distance(found[key], value) > 10 * TOLERANCE for key, value in before.items())
    module = tuned.module(training=True)
    values = module(*(program.example[spec.name] for spec in program.inputs))
    sum(value.square().sum() for value in values if value.requires_grad).backward()
    for key, item in module.named_parameters():
        assert (item.grad is not None and bool(item.grad.any())) == (key not in tuned.frozen), key
