"""Families that PEFT has, on GPT-2 (whose weights are stored [in, out]), Llama, BERT and T5: outputs and gradients equal PEFT's, and
files go both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.passes import IA3, DoRA, LoRA, VeRA
from bmgraph.passes.deltas.delta_pass import DeltaPass
from tests.helpers.captured import captured
from tests.helpers.peft_models import check_with_peft, stirred
from tests.helpers.sweep import sweep

NAMES = ("gpt2", "llama", "bert", "t5")
OUTPUT = {"bert": "last_hidden_state"}
"""The output that is compared, where it is no logits."""

TARGETS: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "mlp.c_proj"),
    "llama": ("k_proj", "v_proj", "down_proj"),
    "bert": ("key", "value", "output.dense"),
    "t5": ("k", "v", "wo"),
}
LAST: dict[str, str] = {"gpt2": "mlp.c_proj", "llama": "down_proj", "bert": "output.dense", "t5": "wo"}
"""What is scaled in front, by IA3."""

Make = Callable[[str], tuple[DeltaPass, Any]]


def lora(name: str) -> tuple[DeltaPass, Any]:
    peft = pytest.importorskip("peft")
    targets = TARGETS[name]
    return LoRA(r=3, alpha=5, targets=targets), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(targets), fan_in_fan_out=name == "gpt2"
    )


def variants(name: str) -> tuple[DeltaPass, Any]:
    peft = pytest.importorskip("peft")
    targets, last = TARGETS[name], LAST[name]
    item = LoRA(
        r=4,
        alpha=6,
        targets=targets,
        rslora=True,
        rank_pattern={last: 2},
        alpha_pattern={last: 3.0},
        bias="all",
    )  # type: ignore[arg-type]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(targets), use_rslora=True, rank_pattern={last: 2},
        alpha_pattern={last: 3}, bias="all", fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    return item, config


def dora(name: str) -> tuple[DeltaPass, Any]:
    peft = pytest.importorskip("peft")
    targets = TARGETS[name]
    return DoRA(r=3, alpha=5, targets=targets), peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=list(targets), use_dora=True, fan_in_fan_out=name == "gpt2"
    )


def ia3(name: str) -> tuple[DeltaPass, Any]:
    peft = pytest.importorskip("peft")
    targets, last = TARGETS[name], (LAST[name],)
    return IA3(targets=targets, feedforward_modules=last), peft.IA3Config(
        target_modules=list(targets), feedforward_modules=list(last), fan_in_fan_out=name == "gpt2"
    )


def vera(name: str) -> tuple[DeltaPass, Any]:
    peft = pytest.importorskip("peft")
    targets = TARGETS[name]
    return VeRA(r=4, targets=targets), peft.VeraConfig(
        r=4, target_modules=list(targets), fan_in_fan_out=name == "gpt2"
    )


CASES = [(name, make) for name in NAMES for make in (lora, variants, dora, ia3, vera)]


@pytest.mark.parametrize(("name", "make"), sweep(CASES, [("gpt2", ia3)]))
def test_it_is_that_of_peft(name: str, make: Make, tmp_path: Path) -> None:
    model, program = captured(name)
    item, config = make(name)
    tuned = stirred(bg.Pipeline([item]).run(program), 0.05)
    assert len(deltas_of(tuned.graph)) >= 4
    check_with_peft(model, program, tuned, tmp_path, config, OUTPUT.get(name, "logits"))
