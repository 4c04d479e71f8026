"""Ranks that differ stop together, with the reason, within seconds."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bmgraph.errors import RankError
from tests.helpers.attacks.ranks import FAULTS, SECONDS, attack, build, rows
from tests.helpers.processes import fresh_processes
from tests.helpers.ranks import run_ranks
from tests.helpers.sweep import sweep

WORDS = {
    "another optimizer": "rank 1 has a different optimizer",
    "another learning rate": "rank 1 has a different lr= than rank 0",
    "another schedule": "rank 1 has a different schedule=",
    "another clipping": "rank 1 has a different clip_norm=",
    "another seed": "rank 1 has a different seed=",
    "a batch in another order": "rank 1 was given another batch",
    "a worker of a loader that fails": "row 3 of this rank is damaged",
    "a skipped step": "rank 1 has made 2 steps, rank 0 1",
    "a learning rate changed later": "rank 1 has another optimizer, learning rate",
    "a save where others step": "rank 1 calls save where rank 0 calls step",
    "a load of another checkpoint": "rank 1 read another checkpoint",
    "a load of nothing": "rank 1: ",
}
"""What rank 0 says of some faults."""

MOST = 120.0
"""Seconds after which a rank was told of one that was killed, on a machine that is busy: a rank that nobody tells waits longer."""

FEW = (
    "another schedule",
    "other weights",
    "a loss that fails",
    "an id out of range",
    "fewer rows",
    "a worker of a loader that fails",
    "a save where others step",
)


@pytest.mark.parametrize(
    ("size", "names"),
    sweep([(2, FEW), (2, tuple(FAULTS)), (3, tuple(FAULTS))], [(2, FEW)]),
    ids=["few", "2", "3"],
)
def test_what_differs_on_one_rank_stops_all(size: int, names: tuple[str, ...], tmp_path: Path) -> None:
    told = run_ranks(size, attack, size, list(names), str(tmp_path))
    for name in names:
        for rank, found in enumerate(told):
            error, seconds = found[name]
            assert error, f"{name}: rank {rank} went on"
            own = rank == size - 1 and "of this rank" in error  # the user's function raised it
            assert own or not error.startswith("UNCLEAR"), f"{name}, rank {rank}: {error}"
            assert "in vain" not in error, f"{name}: nobody told rank {rank}: {error}"
            assert seconds < SECONDS, f"{name}: rank {rank} took {seconds:.0f} CPU s"
        if size == 2 and name in WORDS:
            assert WORDS[name] in told[0][name][0], f"{name}: {told[0][name][0]}"


def _killed(rank: int, port: int, told: Any) -> None:
    torch.set_num_threads(1)
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=100)
    dist.init_process_group("gloo", address, rank=rank, world_size=2, timeout=limit)
    trainer = build()
    trainer.step(rows())
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin = time.monotonic()
    try:
        trainer.step(rows())
    except RankError as error:
        told.put((str(error), time.monotonic() - begin))


def test_a_killed_rank_is_told_to_the_others() -> None:
    context = fresh_processes()
    told = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_killed, args=(rank, port, told)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        processes[0].join(90)
        error, seconds = told.get()
    finally:
        for process in processes:
            process.kill()
    assert error.startswith("rank 1 has left: its process ended without a word")
    assert seconds < MOST
