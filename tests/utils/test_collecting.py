"""Collections while a large model is built: old objects are left out, and all is as before afterwards."""

from __future__ import annotations

import gc

import pytest
import torch

from bmgraph.utils import collecting
from bmgraph.utils.collecting import old_objects_kept


def state() -> tuple[int, tuple[int, int, int]]:
    return gc.get_freeze_count(), gc.get_threshold()


def test_what_is_set_for_a_large_model_is_reset_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    before, weight, inside = state(), torch.ones(3), []

    def build() -> None:
        with old_objects_kept([weight]):
            inside.append(state())
            with old_objects_kept([weight]):  # an inner one changes nothing
                inside.append(state())
            inside.append(state())
            raise KeyError

    with pytest.raises(KeyError):
        build()
    assert inside == [before] * 3
    monkeypatch.setattr(collecting, "LARGE", 12)
    with pytest.raises(KeyError):
        build()
    assert all(frozen > before[0] and thresholds != before[1] for frozen, thresholds in inside[3:])
    assert state() == before
