"""One rank is killed, stopped, or raises: the others end with the reason, and training resumes to equal bits.

`benchmarks/crashes.py` kills 20 times.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.attacks.crashes import Plan, killed, raising, stopped, whole
from tests.helpers.paths import ROOT

SECONDS = 20.0
"""How long the others may take, on a machine that is busy."""


def test_training_goes_on_after_a_kill_to_equal_bits(tmp_path: Path) -> None:
    """Killed beside a save; the run that goes on shows what follows, and the one that nothing disturbs what should have."""
    crash = killed(Plan(tmp_path / "killed", steps=40), rank=1, step=4, delay=0.005, most=SECONDS)
    assert all("rank 1 has left: its process ended without a word" in reason for reason in crash.reasons)
    expected = whole(Plan(tmp_path / "whole", steps=8))
    resumed = whole(Plan(tmp_path / "killed", steps=max(crash.losses) + 2))
    assert resumed, "nothing was left to do"
    assert max(resumed) > max(crash.losses)
    for step, loss in expected.items():
        assert crash.losses.get(step, loss) == resumed.get(step, loss) == loss, step


@pytest.mark.slow
def test_a_rank_whose_data_raise_tells_the_others_why(tmp_path: Path) -> None:
    crash = raising(Plan(tmp_path / "raises", raises_at=4), most=SECONDS)
    for reason in crash.reasons:
        assert "rank 1 has left: it raised ValueError: row 17 of the data is damaged" in reason


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others_after_the_timeout(tmp_path: Path) -> None:
    plan = Plan(tmp_path / "stopped", ranks=3, steps=400, timeout=6.0)
    others, itself = stopped(plan, rank=1, step=4, most=plan.timeout + SECONDS)
    assert others.seconds >= plan.timeout - 2
    assert any("rank 1 has shown no sign of life for" in reason for reason in others.reasons)
    assert all(reason.startswith("RankError: ") for reason in (*others.reasons, *itself.reasons))


SCRIPT = """
import sys, torch, torch.distributed as dist
import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.passes import ZeRO
from tests.helpers.attacks.ranks import Tagger, rows
dist.init_process_group("gloo")
torch.manual_seed(0)
backend = Torch(optimizer=SGD(lr=0.1), timeout=30)
trainer = bg.compile(Tagger(), passes=[ZeRO(3)], example=rows(), backend=backend)
for step in range(6):
    if step == 3 and dist.get_rank() == 1 and sys.argv[1] == "raise":
        raise ValueError("row 17 of the data is damaged")
    trainer.step(rows())
trainer.save(sys.argv[2], wait=False)
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "go on"])
def test_a_script_under_torchrun(tmp_path: Path, what: str) -> None:
    """What ends one rank is written by the other; and the end of a script waits for what is being saved."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), what, str(tmp_path / "saved")], capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if what == "raise":
        assert done.returncode != 0
        assert "rank 1 has left: it raised ValueError: row 17 of the data is damaged" in done.stderr
        assert not (tmp_path / "saved").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "saved" / "manifest.json").exists()
