"""A dimension for which the trace holds only at some sizes is reported as fixed, not as dynamic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError


class Blocks(nn.Module):
    """Takes another branch where the length is not a multiple of 4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S] -> [B, S], doubled where S is a multiple of 4."""
        return x * 2 if x.shape[1] % 4 == 0 else x * 3


def test_a_size_that_decided_a_branch_is_fixed() -> None:
    program = bg.capture(Blocks(), (torch.randn(2, 12),))
    assert program.inputs[0].shape == ("batch", 12)
    assert program.fixed == ("x[1] = 12",)
    with pytest.raises(InputError):
        program(x=torch.randn(2, 13))


def test_a_size_that_only_has_bounds_stays_dynamic() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(16, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.positions[: x.shape[1]]

    program = bg.capture(Table(), (torch.randn(2, 12, 4),))
    assert program.inputs[0].shape == ("batch", "sequence", 4)


def test_a_guard_that_fails_only_far_from_the_example_is_proved_there() -> None:
    class Halved(nn.Module):
        """Pads where an odd number of frames of 8 was halved and doubled."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            frames = x.unfold(1, 8, 8).mean(-1)
            doubled = frames[:, : frames.shape[1] // 2].repeat_interleave(2, 1)
            if doubled.shape[1] < frames.shape[1]:
                doubled = nn.functional.pad(doubled, (0, 1))
            return doubled

    program = bg.capture(Halved(), (torch.randn(2, 48),))
    assert program.fixed == ("x[1] = 48",)
