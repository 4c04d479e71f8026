"""Compares a tuned program with PEFT: what one saves the other loads, to equal outputs and equal gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.passes import LoadDelta
from bmgraph.verify.metrics import relative_error

EXACT = 1e-5

PROMPTED = {
    "gpt2": ("PeftModelForCausalLM", "CAUSAL_LM", "logits"),
    "llama": ("PeftModelForCausalLM", "CAUSAL_LM", "logits"),
    "bert": ("PeftModelForFeatureExtraction", "FEATURE_EXTRACTION", "last_hidden_state"),
    "t5": ("PeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "logits"),
}
"""PEFT's class and task for prompts on architectures of the zoo, and the output to compare."""


def stirred(program: Program, size: float = 0.2, seed: int = 0) -> Program:
    """The program with changed values for all that trains, near what they were."""
    generator, moved = torch.Generator().manual_seed(seed), program.clone()
    for name, tensor in program.parameters.items():
        if name not in program.frozen:
            moved.parameters[name] = tensor + size * torch.randn(tensor.shape, generator=generator)
    return moved


def check_with_peft(
    model: nn.Module,
    program: Program,
    tuned: Program,
    folder: Path,
    config: Any = None,
    output: str = "logits",
) -> Program:
    """Save `tuned` for PEFT, compare outputs and gradients there, and load what PEFT saves again; returns that program.

    With `config`, PEFT makes an adapter of its own first, which is trained and loaded here.
    """
    peft = pytest.importorskip("peft")
    tuned.save_delta(str(folder / "ours"))
    theirs = peft.PeftModel.from_pretrained(
        copy.deepcopy(model), str(folder / "ours"), is_trainable=True
    ).eval()
    _compare(theirs, tuned, output)
    theirs.save_pretrained(folder / "theirs")
    again = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": folder / "theirs"})
    _compare(theirs, again, output)
    assert {name for name in again.parameters if name not in again.frozen} == {
        name for name in tuned.parameters if name not in tuned.frozen
    }
    if config is not None:
        own = peft.get_peft_model(copy.deepcopy(model), config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for item in own.parameters():
                if item.requires_grad:
                    item += 0.2 * torch.randn(item.shape, generator=generator)
        own.save_pretrained(folder / "own")
        _compare(own, bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": folder / "own"}), output)
    return again


def _compare(theirs: nn.Module, ours: Program, output: str) -> None:
    """Equal outputs, and equal gradients of all that trains, as far as both name it alike: compared by their norms and sums."""
    given = ours.example
    theirs.zero_grad()
    found = theirs(**given)[output]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    assert relative_error(ours(**given)[output], found.detach()) < EXACT
    (found * weights).sum().backward()
    module = ours.module()
    for name, item in module.named_parameters():
        item.requires_grad_(name not in ours.frozen)
    values = dict(
        zip((spec.name for spec in ours.outputs), module(*(given[spec.name] for spec in ours.inputs)))
    )
    (values[output] * weights).sum().backward()
    mine = {name: item.grad for name, item in module.named_parameters() if name not in ours.frozen}
    other = {name: item.grad for name, item in theirs.named_parameters() if item.requires_grad}
    assert len(mine) == len(other)
    for one, two in zip(_sorted(mine), _sorted(other)):
        assert relative_error(one, two) < EXACT


def _sorted(gradients: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
    """Flat gradients in an order that names do not decide."""
    flat = [torch.zeros(1) if item is None else item.flatten() for item in gradients.values()]
    return sorted(flat, key=lambda item: (item.numel(), float(item.double().norm())))
