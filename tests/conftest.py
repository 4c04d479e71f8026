"""Captured toys that many tests share, how tests are run, and what a quick run says that it left out."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.ir.program import Program
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens

# The toys are too small to share between threads, which would wait for each other on cores that run other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

LONGEST, LONGEST_SLOW = 600, 3600
"""Seconds after which a test that still waits is a failure."""

LEFT = pytest.StashKey[Counter[str]]()
"""How many slow tests were left out, by folder."""


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ends(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test waits for ever, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return
    limit = LONGEST_SLOW if request.node.get_closest_marker("slow") else LONGEST

    def stop(*_: Any) -> None:
        raise TimeoutError(f"the test did not end within {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def model() -> TinyEncoder:
    return tiny_encoder()


@pytest.fixture(scope="session")
def program(model: TinyEncoder) -> Program:
    """Captured once; tests can share it, since passes never change the program they are given."""
    return bg.capture(model, tokens())


@pytest.fixture(scope="session")
def batches() -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 8, seed) for seed in range(4)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT] = Counter()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            place = item.path.relative_to(Path(__file__).parent).parts[0]
            item.config.stash[LEFT][place.removesuffix(".py")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells the process that prints the summary, which collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = dict(session.config.stash[LEFT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """All workers collect the same tests: any of them tells the count."""
    node.config.stash[LEFT] = (
        Counter(getattr(node, "workeroutput", {}).get("slow")) or node.config.stash[LEFT]
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what `-m "not slow"` left out; with -k, what was left out by name cannot be told from it."""
    left = config.stash[LEFT]
    if left and "not slow" in config.option.markexpr and not config.option.keyword:
        places = ", ".join(f"{place} {count}" for place, count in sorted(left.items()))
        terminalreporter.write_line(f"{left.total()} tests left to -m slow (make slow): {places}")
