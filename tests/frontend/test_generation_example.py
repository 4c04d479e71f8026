"""Ids alone get a mask of ones where forward takes one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bmgraph.frontend.generation_example import with_attention_mask


class Masked(nn.Module):
    """Takes ids and a mask."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """i64[B, S], i64[B, S] -> i64[B, S]."""
        return input_ids if attention_mask is None else input_ids * attention_mask


class Unmasked(nn.Module):
    """Takes ids only."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """i64[B, S] -> i64[B, S]."""
        return input_ids


IDS, MASK = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    "example",
    [
        IDS,
        (IDS,),
        {"input_ids": IDS},
        {"input_ids": IDS, "use_cache": False},
        {"decoder_input_ids": IDS[:, :1], "input_ids": IDS},
    ],
)
def test_ids_alone_get_a_mask_of_ones(example: Any) -> None:
    found = with_attention_mask(Masked(), example)
    assert isinstance(found, dict)
    assert torch.equal(found["attention_mask"], torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Masked(), {"input_ids": IDS, "attention_mask": MASK}),
        (Masked(), (IDS, MASK)),
        (Masked(), {"input_ids": torch.zeros(2, 3)}),
        (Masked(), {"input_ids": IDS, "labels": IDS}),
        (Unmasked(), {"input_ids": IDS}),
    ],
)
def test_other_examples_stay_as_they_are(model: nn.Module, example: Any) -> None:
    assert with_attention_mask(model, example) is example
