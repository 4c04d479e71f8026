"""Runs a function on several gloo ranks, each a process of its own."""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.processes import fresh_processes

SECONDS = 150
"""Time limit for all ranks, in seconds."""


def run_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(rank, *arguments)` on each of `size` ranks; returns the results in order (plain values, text, tensors).

    `work` must be a module-level function. Raises AssertionError where a rank fails or hangs.
    """
    context = fresh_processes()
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, results, work, arguments))
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    try:
        found: dict[int, Any] = {}
        latest = time.monotonic() + 2 * SECONDS
        for _ in ranks:
            while results.empty():
                assert time.monotonic() < latest, "a rank did not end"
                ended = [rank.exitcode for rank in ranks if rank.exitcode not in (None, 0)]
                assert not ended or not results.empty(), f"a rank ended with {ended}"
                ranks[0].join(0.05)
            rank, error, value = results.get()
            assert not error, f"rank {rank}: {error}"
            found[rank] = torch.load(io.BytesIO(value))
        for process in ranks:
            process.join(30)
            assert process.exitcode == 0
        return [found[rank] for rank in range(size)]
    finally:
        for process in ranks:
            process.kill()


def _rank(
    rank: int, size: int, port: int, results: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    try:
        told = io.BytesIO()
        torch.save(work(rank, *arguments), told)  # by value: the rank's memory goes away when it exits
        results.put((rank, "", told.getvalue()))
    except Exception as error:  # reported to the test, which fails with it
        results.put((rank, f"{type(error).__name__}: {error}", None))
        raise
    dist.barrier()
    dist.destroy_process_group()
