"""Drift: padding is left out where the sizes are the mask's, and nowhere else; a channel of zeros stays zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.verify.padding import padding_mask
from bmgraph.verify.reference_outputs import Reference
from bmgraph.verify.weight_only_check import _check_weight

CLASSES = 5


class Classifier(nn.Module):
    """Hidden states [batch, sequence, 8] and logits [batch, classes]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(ids)
        return x, self.head((x * mask[..., None]).mean(1))


def test_as_many_classes_as_positions_are_not_padding() -> None:
    mask = torch.ones(3, CLASSES, dtype=torch.long)
    mask[:, 2:] = 0
    program = bg.capture(Classifier(), {"ids": torch.randint(0, 11, (3, CLASSES)), "mask": mask})
    reference = Reference.take(program, program.example)
    hidden, logits = (spec.name for spec in program.outputs)
    wrong = reference.rerun(program)
    wrong.outputs[0][logits][:, 2:] += 1
    assert reference.drift_to(wrong).error > 0.1
    padding = reference.rerun(program)
    padding.outputs[0][hidden][:, 2:] += 1
    assert reference.drift_to(padding).error == 0


class Attention(nn.Module):
    """Attention with a boolean mask in one of the two conventions."""

    def __init__(self, ones_hide: bool) -> None:
        super().__init__()
        self.ones_hide, self.embed = ones_hide, nn.Embedding(11, 8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x, seen = self.embed(ids)[:, None], ~mask if self.ones_hide else mask
        return nn.functional.scaled_dot_product_attention(x, x, x, seen[:, None, None, :])[:, 0]


@pytest.mark.parametrize("ones_hide", [False, True])
def test_a_boolean_mask_counts_where_its_zeros_hide_keys(ones_hide: bool) -> None:
    mask = torch.zeros(2, 7, dtype=torch.bool) if ones_hide else torch.ones(2, 7, dtype=torch.bool)
    program = bg.capture(Attention(ones_hide), {"ids": torch.randint(0, 11, (2, 7)), "mask": mask})
    assert padding_mask(program, program.example) == (None if ones_hide else "mask")


@pytest.mark.parametrize("axis", [0, None])
def test_a_channel_of_zeros_must_stay_zero(axis: int | None) -> None:
    old = torch.randn(64, 64)
    old[3] = 0
    _check_weight("here", old.clone(), old, 0.2, axis)
    new = old.clone()
    new[3] = 0.5
    if axis is None:
        old, new = old.clone(), new.clone()
        old[:, 5], new[:, 5] = 0, 0.5  # along either axis a channel of zeros is no longer zero
    with pytest.raises(VerificationError, match=r"here: channel 3|here: channel 5"):
        _check_weight("here", new, old, 0.2, axis)
