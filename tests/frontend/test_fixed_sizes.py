"""A size that only the program fixes is told at capture, with the line that fixed it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import bmgraph as bg


class Recurrent(nn.Module):
    """A loop over the sequence in Python."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x f[B, S], mask f[B, S] -> f[B]."""
        state = x[:, 0]
        for step in range(x.shape[1]):
            state = state * 0.5 + x[:, step] * mask[:, step]
        return state


class Blocks(nn.Module):
    """Takes another branch where the length is not a multiple of 4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """f[B, S] -> f[B, S]."""
        return x * 2 if x.shape[1] % 4 == 0 else x * 3


def test_a_length_that_a_loop_fixes_is_told_with_its_line() -> None:
    example = {"x": torch.randn(2, 6), "mask": torch.ones(2, 6)}
    with pytest.warns(
        UserWarning, match=r"the size x\[1\] = 6 is fixed .* at .*test_fixed_sizes.py:20"
    ) as told:
        program = bg.capture(Recurrent(), example)
    assert told[0].filename == __file__
    assert len(program.narrower) == 1
    engine = bg.compile(program, passes=[], backend="torch")
    assert program.narrower[0] in str(engine.report.notes)


def test_a_length_that_decided_a_branch_is_told_with_its_line() -> None:
    with pytest.warns(UserWarning, match=r"x\[1\] = 12 is fixed .* at .*test_fixed_sizes.py:30"):
        bg.capture(Blocks(), (torch.randn(2, 12),))


def test_sizes_that_the_model_fixes_or_nobody_wants_free_are_no_news() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),)).narrower == ()
        bg.capture(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), (torch.randn(2, 2),))
        bg.capture(Blocks(), (torch.randn(2, 12),), dynamic=False)


def test_a_saved_program_keeps_what_was_told(tmp_path: pytest.TempPathFactory) -> None:
    with pytest.warns(UserWarning, match="is fixed"):
        program = bg.capture(Blocks(), (torch.randn(2, 12),))
    program.save(f"{tmp_path}/saved")
    loaded = bg.load(f"{tmp_path}/saved")
    assert isinstance(loaded, bg.Program)
    assert loaded.narrower == program.narrower
