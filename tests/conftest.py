"""Shared toy models, threads and time limits of tests, and the summary of slow tests that a quick run skipped."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import bmgraph as bg
from bmgraph.ir.program import Program
from tests.helpers.models import TinyEncoder, tiny_encoder, tokens

# The toys are too small for several threads, which would wait for each other on cores that run other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The same examples in each run, on machines of any speed.
settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

LONGEST, LONGEST_SLOW = 600, 3600
"""Time limits of quick and slow tests, in seconds."""

LEFT = pytest.StashKey[Counter[str]]()
"""Folder -> number of slow tests deselected."""


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _ends(request: pytest.FixtureRequest) -> Iterator[None]:
    """Limit the time of each test, where the system has SIGALRM."""
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


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            place = item.path.relative_to(Path(__file__).parent).parts[0]
            item.config.stash[LEFT][place.removesuffix(".py")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send a worker's counts to the process that prints the summary, which collects no tests itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["slow"] = dict(session.config.stash[LEFT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take the counts of any worker, since all workers collect the same tests."""
    node.config.stash[LEFT] = (
        Counter(getattr(node, "workeroutput", {}).get("slow")) or node.config.stash[LEFT]
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Report what `-m "not slow"` deselected; not with -k, which deselects by name in the same way."""
    left = config.stash[LEFT]
    if left and "not slow" in config.option.markexpr and not config.option.keyword:
        places = ", ".join(f"{place} {count}" for place, count in sorted(left.items()))
        terminalreporter.write_line(f"{left.total()} tests left to -m slow (make slow): {places}")
