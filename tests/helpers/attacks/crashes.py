"""Crashes of one rank while it trains and saves: killed, stopped, or raising in its own code; and what the others then do."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bmgraph.backends import AdamW
from bmgraph.passes import ZeRO
from tests.helpers.attacks.ranks import Tagger, rows
from tests.helpers.processes import fresh_processes

SAVE_EVERY = 2
BUILDING = 200.0
"""Seconds that ranks may take to start and build, on a machine that is busy with other things."""


@dataclass(frozen=True)
class Plan:
    """A run: how many ranks at which stage (0 to 3, -1 without ZeRO), up to which step."""

    folder: Path
    ranks: int = 2
    stage: int = 3
    steps: int = 12
    timeout: float = 30.0
    raises_at: int = 0
    """Step before which the last rank's data raise; 0 for none."""


@dataclass
class Told:
    """What one rank told: its losses by step, and the error that ended it, with the time of day."""

    losses: dict[int, float] = field(default_factory=dict)
    error: str = ""


def newest(folder: Path) -> Path | None:
    """The checkpoint of the last step."""
    return max(folder.glob("step_*"), default=None)


def train(plan: Plan, tell: Callable[..., None]) -> None:
    """Go on from the newest checkpoint, and save beside training."""
    import bmgraph as bg
    from bmgraph.backends import Torch

    torch.manual_seed(0)
    passes = [ZeRO(plan.stage)] if plan.stage >= 0 else []
    backend = Torch(optimizer=AdamW(lr=1e-2), clip_norm=1.0, timeout=plan.timeout)
    trainer = bg.compile(Tagger(48), passes=passes, example=rows(seed=0), backend=backend)
    found = newest(plan.folder)
    if found is not None:
        trainer.load(found)
    for step in range(trainer.steps, plan.steps):
        tell(at=step)
        tell(step=step + 1, loss=trainer.step(data(plan, step)).loss)
        if (step + 1) % SAVE_EVERY == 0:
            trainer.save(plan.folder / f"step_{step + 1:04d}", wait=False)
    trainer.wait()


def data(plan: Plan, step: int) -> dict[str, torch.Tensor]:
    """The batch of a step, from data that may raise on the last rank."""
    if step + 1 == plan.raises_at and dist.get_rank() == plan.ranks - 1:
        raise ValueError("row 17 of the data is damaged")
    return rows(seed=step + 1)


def _rank(rank: int, port: int, plan: Plan, file: Path) -> None:
    torch.set_num_threads(1)
    with open(file, "w", buffering=1) as stream:

        def tell(**what: Any) -> None:
            print(json.dumps(what), file=stream)

        if plan.ranks > 1:
            dist.init_process_group(
                "gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=plan.ranks,
                timeout=timedelta(seconds=BUILDING),
            )  # fmt: skip
        try:
            train(plan, tell)
        except BaseException as error:
            tell(error=f"{type(error).__name__}: {error}")
            sys.excepthook(type(error), error, error.__traceback__)  # multiprocessing does not call it
            raise


class Run:
    """The processes of one run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.files = [
            plan.folder.parent / f"{plan.folder.name}-{port}-{rank}.log" for rank in range(plan.ranks)
        ]
        self.processes = [
            fresh_processes().Process(target=_rank, args=(rank, port, plan, file))
            for rank, file in enumerate(self.files)
        ]
        for process in self.processes:
            process.start()

    def told(self, rank: int) -> Told:
        """What a rank has told until now."""
        found = Told()
        text = self.files[rank].read_text() if self.files[rank].exists() else ""
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                continue  # it is being written
            one = json.loads(line)
            if "loss" in one:
                found.losses[one["step"]] = one["loss"]
            found.error = one.get("error", found.error)
        return found

    def until(self, rank: int, step: int) -> None:
        """Wait until a rank has made a step."""
        latest = time.monotonic() + BUILDING
        while step not in self.told(rank).losses:
            assert time.monotonic() < latest, "the ranks do not get on"
            assert all(process.is_alive() for process in self.processes), [
                self.told(r) for r in range(self.plan.ranks)
            ]
            time.sleep(0.002)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def ended(self, ranks: Sequence[int], most: float) -> float:
        """Wait until these ranks have ended; returns the seconds. Raises AssertionError after `most`."""
        begin = time.monotonic()
        for rank in ranks:
            self.processes[rank].join(max(0.0, begin + most - time.monotonic()))
            assert self.processes[rank].exitcode is not None, f"rank {rank} hangs"
        return time.monotonic() - begin

    def close(self) -> None:
        """End all that is left."""
        for process in self.processes:
            process.kill()
            process.join()


def whole(plan: Plan) -> dict[int, float]:
    """The losses of a run that nothing disturbs."""
    run = Run(plan)
    try:
        run.ended(range(plan.ranks), BUILDING)
        told = [run.told(rank) for rank in range(plan.ranks)]
        assert not any(one.error for one in told), told
        return told[0].losses
    finally:
        run.close()


@dataclass
class Crash:
    """What came of one crash."""

    seconds: float
    """Until all other ranks had ended."""
    reasons: list[str]
    losses: dict[int, float]
    """Those that rank 0 told before."""
    while_saving: bool = False
    """Whether a checkpoint was being written."""


def killed(plan: Plan, rank: int, step: int, delay: float, most: float) -> Crash:
    """SIGKILL a rank so many seconds after a step."""
    run = Run(plan)
    try:
        run.until(rank, step)
        time.sleep(delay)
        run.send(rank, signal.SIGKILL)
        run.processes[rank].join()
        saving = any(name.startswith(".step_") for name in os.listdir(plan.folder))
        others = [other for other in range(plan.ranks) if other != rank]
        seconds = run.ended(others, most)
        return Crash(seconds, [run.told(other).error for other in others], run.told(0).losses, saving)
    finally:
        run.close()


def stopped(plan: Plan, rank: int, step: int, most: float) -> tuple[Crash, Crash]:
    """SIGSTOP a rank after a step, and let it go on when the others have ended: what came of them, and of it."""
    run = Run(plan)
    try:
        run.until(rank, step)
        run.send(rank, signal.SIGSTOP)
        others = [other for other in range(plan.ranks) if other != rank]
        seconds = run.ended(others, most)
        first = Crash(seconds, [run.told(other).error for other in others], run.told(0).losses)
        run.send(rank, signal.SIGCONT)
        return first, Crash(run.ended([rank], most), [run.told(rank).error], {})
    finally:
        run.close()


def raising(plan: Plan, most: float) -> Crash:
    """The data of the last rank raise."""
    run = Run(plan)
    try:
        last = plan.ranks - 1
        run.until(last, plan.raises_at - 1)
        seconds = run.ended(range(plan.ranks), most)
        return Crash(seconds, [run.told(other).error for other in range(last)], run.told(0).losses)
    finally:
        run.close()


def random_kills(plan: Plan, count: int, seed: int, most: float) -> list[Crash]:
    """Kill a random rank at a random moment, so many times, each run going on from what the one before has saved."""
    generator, found = random.Random(seed), []
    for _ in range(count):
        latest = newest(plan.folder)
        begin = int(latest.name.removeprefix("step_")) if latest else 0
        step = begin + generator.randint(1, 4)
        longer = Plan(plan.folder, plan.ranks, plan.stage, step + 40, plan.timeout)
        rank, delay = generator.randrange(plan.ranks), generator.random() * 0.05
        found.append(killed(longer, rank, step, delay, most))
    return found
