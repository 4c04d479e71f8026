"""The rewrites of the engine stage, in order."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Edit:
    name: str
    count: int


def optimise(model: ir.Model, *, mask_branch: bool = False) -> list[Edit]:
    return []
