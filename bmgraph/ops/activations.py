"""Activations that an option names."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

aten = torch.ops.aten

ACTIVATIONS: Mapping[str, Any] = MappingProxyType(
    {
        "relu": aten.relu.default,
        "gelu": aten.gelu.default,
        "silu": aten.silu.default,
        "tanh": aten.tanh.default,
    }
)
"""Name of an activation, as torch.nn.functional has it -> its operator."""
