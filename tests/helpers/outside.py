"""Packages from outside of bmgraph: a folder as `pip install` leaves it, and processes that find it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from tests.helpers.paths import ROOT

MODEL = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    return made, {"input": torch.randn(4, 16)}
"""


def installed(
    folder: Path,
    entry_points: str,
    modules: Mapping[str, str] = MappingProxyType({}),
    package: str = "outside",
) -> Path:
    """The folder, with these modules and the metadata of a package that declares their entry points."""
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


def run_python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A python process that has the folder on its path."""
    path = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=site, capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
