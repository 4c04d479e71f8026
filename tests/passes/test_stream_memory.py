"""Stream keeps its limit by what the system counts: anonymous memory of a process of its own, sampled while calls run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.passes import Stream
from tests.helpers.processes import fresh_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells RssAnon"),
]
WIDTH, LAYERS, ROWS = 1024, 24, 20_000
"""182 MB in fp32: 4.2 MB a layer, 82 MB of a table."""
LIMIT = 60_000_000


class Wide(nn.Module):
    """Layers behind a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(ids)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x.mean(-1)


def _anonymous() -> int:
    """Bytes of this process's anonymous memory that are resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise OSError("this system does not tell RssAnon")


def _most(call: Callable[[], Any]) -> int:
    """The most bytes above those at first while a call runs, sampled every millisecond."""
    first, ended = _anonymous(), threading.Event()
    found = [0]

    def sample() -> None:
        while not ended.wait(0.001):
            found[0] = max(found[0], _anonymous() - first)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        call()
    finally:
        ended.set()
        thread.join()
    return found[0]


def _measure(folder: str, told: Any) -> None:
    """In a process of its own: compile, then call with one row, with many, and with one again."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = Wide().eval()
    ids = torch.arange(16)[None]
    engine = bg.compile(model, [Stream(LIMIT)], example=(ids,), weights=folder, backend=Torch(), verify="off")
    made = {
        name: _most(lambda batch=batch: engine(ids=batch))  # type: ignore[misc]
        for name, batch in {
            "first": ids,
            "again": ids,
            "many": torch.arange(512).reshape(32, 16),
            "one": ids,
        }.items()
    }
    with torch.no_grad():
        expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
        equal = torch.equal(engine(ids=ids)["output"], expected)
    told.put(made | {"equal": equal, "read": engine.schedule(ids=ids).read})


def _told_by(measure: Callable[[str, Any], None], folder: Path) -> dict[str, Any]:
    """What a function tells of a folder in a process of its own."""
    context = fresh_processes()
    told = context.SimpleQueue()
    process = context.Process(target=measure, args=(str(folder), told))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    found: dict[str, Any] = told.get()
    return found


def test_anonymous_memory_stays_within_the_limit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Wide().eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.save(model(torch.arange(16)[None]), tmp_path / "expected.pt")
    found = _told_by(_measure, tmp_path)
    assert found.pop("equal")
    assert found.pop("read") > LIMIT / 2
    assert max(found.values()) <= LIMIT, found
    assert max(found.values()) > LIMIT / 4, found


def _plan_large(folder: str, told: Any) -> None:
    """In a process of its own, which is told that no weights fit in memory: plan for a large shape."""
    for module in ("frontend.weights_folder", "frontend.part_proof"):
        found: Any = import_module(f"bmgraph.{module}")
        found.memory_budget = lambda: 0
    from benchmarks.tensors_on_disk import SHAPE, make_model, write_files

    model = make_model(SHAPE, 2)
    write_files(Path(folder), model, -1)
    example = {name: torch.ones(1, 64, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    bg.capture(torch.nn.Linear(4, 4), (torch.zeros(2, 4),))  # what torch.export imports late
    made: dict[str, Any] = {}

    def plan() -> None:
        before = _read()
        program = bg.capture(model, example, weights=folder, prove=False)
        engine: Any = bg.compile(program, [Stream("2GB")], backend=Torch(), verify="structure")
        schedule = engine.schedule(**example)
        made.update(peak=schedule.peak, limit=schedule.limit, reads=schedule.read, read=_read() - before)

    made["anonymous"] = _most(plan)
    told.put(made)


def _read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def test_a_large_shape_plans_within_its_limit_without_reading_it(tmp_path: Path) -> None:
    """Sparse files of 7.6 GB, as wide as a Llama of 70 billion parameters."""
    pytest.importorskip("transformers")
    found = _told_by(_plan_large, tmp_path)
    assert found["peak"] <= found["limit"] == 2 * 10**9
    assert found["reads"] > 3e9
    assert found["read"] < 2e7
    assert found["anonymous"] < 5e8
