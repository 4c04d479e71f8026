"""Small programs and bundles for tests of saved folders."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.serialize.bundle import seal


class Toy(nn.Module):
    """Embedding, linear, GELU, norm, a split and a reshape with symbolic sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.outer = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(nn.functional.gelu(self.inner(self.embedding(ids))))
        left, right = x.chunk(2, -1)
        x = self.outer(torch.cat([right, left], -1))
        return x.reshape(ids.shape[0] * ids.shape[1], 3)


def toy() -> Program:
    torch.manual_seed(0)
    return bg.capture(Toy().eval(), {"ids": torch.randint(0, 11, (2, 5))})


def edit_json(path: Path, change: Any) -> None:
    """Edit a JSON file in place with `change(value)`, which may return a new value; a manifest's checksum is recomputed."""
    value = json.loads(path.read_text())
    changed = change(value)
    value = value if changed is None else changed
    path.write_bytes(seal(value) if path.name == "manifest.json" else json.dumps(value).encode())


def sign(folder: Path) -> None:
    """Recompute the manifest's sizes and checksums, as an attacker would."""

    def redo(manifest: dict[str, Any]) -> None:
        for name, entry in manifest["files"].items():
            data = (folder / name).read_bytes()
            entry.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())

    edit_json(folder / "manifest.json", redo)
