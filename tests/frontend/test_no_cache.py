"""A cache that a part of a model makes by its config is turned off while the model is captured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import CaptureError


class Cache:
    """Holds a tensor, and is none."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys


class Part(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.linear = config, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, use_cache: bool | None = None) -> dict[str, Any]:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        h = self.linear(x)
        return {"hidden": h, "cache": Cache(h)} if use_cache else {"hidden": h}


class Whole(nn.Module):
    """Its forward has no `use_cache`, and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.part = Part(self.config)

    def forward(self, x: torch.Tensor, **options: Any) -> dict[str, Any]:
        return self.part(x, **options)


def test_the_cache_is_off_and_the_config_as_it_was() -> None:
    model = Whole()
    program = bg.capture(model, {"x": torch.randn(3, 4)})
    assert [spec.name for spec in program.outputs] == ["hidden"]
    assert model.config.use_cache is True
    with pytest.raises(CaptureError, match="use_cache=False"):
        bg.capture(model, {"x": torch.randn(3, 4), "use_cache": True})
    assert model.config.use_cache is True
