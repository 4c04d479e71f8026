"""Processes with other hash seeds, as ranks of a launcher have, trace the same step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

TRACE = """
import torch
from bmgraph.ir.joined_graphs import join
from bmgraph.training.joint_graph import trace_step
from tests.helpers.training import captured_to_train
torch.manual_seed(0)
for name in ("gpt2", "llama", "bert", "t5"):
    print(trace_step(join(captured_to_train(name))[0], "loss", "whole"))
"""


@pytest.mark.slow
def test_hash_seeds_change_nothing() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", TRACE], capture_output=True, text=True, check=True, cwd=ROOT, timeout=900,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        ).stdout
        for seed in ("1", "3", "4")
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert "sym_size" in found[0]
