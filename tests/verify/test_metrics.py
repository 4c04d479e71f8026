"""Drift: padding is left out where the sizes are the mask's, and nowhere else; a channel of zeros stays zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import VerificationError
from bmgraph.verify.measures import check_weight
from bmgraph.verify.metrics import drift, relative_error
from bmgraph.verify.padding import padding_mask
from bmgraph.verify.reference_outputs import Reference

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


class Predict(nn.Module):
    """Attention with padding written as an integer mask, and a mask of tokens to predict, or of words to allow."""

    def __init__(self, ones_hide: bool) -> None:
        super().__init__()
        self.ones_hide, self.embed = ones_hide, nn.Embedding(11, 8)

    def forward(
        self, ids: torch.Tensor, prediction_mask: torch.Tensor, padding_mask: torch.Tensor
    ) -> torch.Tensor:
        x = self.embed(ids)[:, None] + prediction_mask[:, None, :, None]
        hidden = padding_mask if self.ones_hide else 1 - padding_mask
        near = torch.arange(ids.shape[1])
        bias = (near[None] - near[:, None]).abs() * -0.1  # so that the mask is more than padding
        bias = bias + hidden[:, None, None, :] * -1e9
        return nn.functional.scaled_dot_product_attention(x, x, x, bias)[:, 0]


@pytest.mark.parametrize("ones_hide", [False, True])
def test_an_integer_mask_counts_where_its_zeros_hide_keys(ones_hide: bool) -> None:
    """Neither tokens to predict nor the padding itself are real positions."""
    real = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    batch = {
        "ids": torch.randint(0, 11, (2, 7)),
        "prediction_mask": torch.tensor([[0, 1, 0, 0, 1, 0, 0]] * 2),
        "padding_mask": 1 - real if ones_hide else real,
    }
    program = bg.capture(Predict(ones_hide), batch)
    assert padding_mask(program, batch) == (None if ones_hide else "padding_mask")


def test_a_mask_of_words_hides_no_position() -> None:
    class Words(nn.Module):
        def forward(self, x: torch.Tensor, vocabulary_mask: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(vocabulary_mask[:, None, :] == 0, -1e9)

    allowed = torch.tensor([[1, 0, 1, 1, 0]] * 2)
    program = bg.capture(Words(), {"x": torch.randn(2, 5, 5), "vocabulary_mask": allowed})
    assert padding_mask(program, program.example) is None


@pytest.mark.parametrize("axis", [0, None])
def test_a_channel_of_zeros_must_stay_zero(axis: int | None) -> None:
    old = torch.randn(64, 64)
    old[3] = 0
    check_weight("here", old.clone(), old, 0.2, axis)
    new = old.clone()
    new[3] = 0.5
    if axis is None:
        old, new = old.clone(), new.clone()
        old[:, 5], new[:, 5] = 0, 0.5  # along either axis a channel of zeros is no longer zero
    with pytest.raises(VerificationError, match=r"here: channel 3|here: channel 5"):
        check_weight("here", new, old, 0.2, axis)


def test_both_parts_of_complex_values_count() -> None:
    value = torch.randn(5, dtype=torch.complex64)
    assert relative_error(value, value.clone()) == 0
    assert relative_error(value.conj(), value.conj().resolve_conj()) == 0
    assert relative_error(value.conj(), value) > 0.1
    assert relative_error(value.real, value) == float("inf")


def test_rows_are_measured_in_parts_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = torch.randn(7, 5, 30), torch.randn(7, 5, 30)
    whole = drift({"y": mine}, {"y": theirs})
    monkeypatch.setattr("bmgraph.verify.metrics.PART", 64)
    parts = drift({"y": mine}, {"y": theirs})
    cosine = torch.nn.functional.cosine_similarity(mine.double(), theirs.double(), dim=-1).mean()
    assert parts.cosine == whole.cosine == float(cosine)
    assert parts.divergence == whole.divergence
