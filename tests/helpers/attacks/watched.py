"""Loads hostile folders in a process of its own, and says how each ended, in what time and memory."""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

SECONDS = 30.0
SPARE_BYTES = 200 * 2**20
"""What loading a hostile folder may take beyond twice its size."""

HELD = ("refused", "loaded")


@dataclass(frozen=True)
class Outcome:
    """How one attack ended: "refused" and "loaded" are held; "raised", "died", "hung" are not.

    `seconds`: of the processor; `grown`: bytes beyond before.
    """

    attack: str
    end: str
    told: str
    seconds: float
    grown: int
    allowed: int

    @property
    def held(self) -> bool:
        """Whether it was refused or harmless, in time and memory."""
        return self.end in HELD and self.seconds < SECONDS and self.grown < self.allowed


_LOADER = """
import json, sys, time
from importlib import import_module
import torch
from bmgraph.errors import BmgraphError
torch.set_num_threads(1)
module, _, name = sys.argv[1].partition(":")
load = getattr(import_module(module), name)(sys.argv[2:])
def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print("ready", flush=True)
for line in sys.stdin:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before, began = peak(), time.process_time()
    try:
        load(line.strip())
        end, told = "loaded", ""
    except BmgraphError as error:
        end, told = "refused", str(error)
    except BaseException as error:
        end, told = "raised", f"{type(error).__name__}: {error}"
    print(json.dumps([end, told[:300], time.process_time() - began, peak() - before]), flush=True)
"""


class Watched:
    """A process that loads one folder after the other; a dead one is told and replaced.

    `loader` names a function, as `module:function`, that is called once with the folders `warm`, to load them first, and
    returns the function that loads a folder. That raises BmgraphError to refuse it; what else it raises is a fault.
    """

    def __init__(self, warm: list[Path], loader: str = "tests.helpers.attacks.watched:load_bundles") -> None:
        self._warm, self._loader = warm, loader
        self._process: subprocess.Popen[str] | None = None

    def load(self, attack: str, folder: Path) -> Outcome:
        """Load a folder."""
        process = self._started()
        assert process.stdin is not None
        size = sum(item.lstat().st_size for item in folder.rglob("*"))
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        began = time.monotonic()
        line = next_line(process, 4 * SECONDS)
        allowed = 2 * size + SPARE_BYTES
        if line:
            end, told, seconds, grown = json.loads(line)
            return Outcome(attack, end, told, seconds, grown, allowed)
        try:
            died = process.wait(5) is not None
        except subprocess.TimeoutExpired:
            died = False
        self.close()
        return Outcome(attack, "died" if died else "hung", "", time.monotonic() - began, 0, allowed)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=60)
            self._process = None

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LOADER, self._loader, *map(str, self._warm)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            )  # fmt: skip
            assert next_line(self._process, 300).strip() == "ready"
        return self._process


def next_line(process: subprocess.Popen[str], seconds: float) -> str:
    """The next line that a process prints; "" if it ends or says nothing in time."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else "\n"[:0]


def refusals(
    load: Callable[[str], None], folders: Iterable[tuple[str, Path]], harmless: Container[str]
) -> list[str]:
    """Load each of (name, folder) in this process; what went wrong: those that were loaded and are not harmless."""
    from bmgraph.errors import BmgraphError

    wrong = []
    for name, folder in folders:
        try:
            load(str(folder))
        except BmgraphError:
            continue
        if name not in harmless:
            wrong.append(name)
    return wrong


def load_bundles(warm: list[str]) -> Callable[[str], None]:
    """Loads programs and engines."""
    import bmgraph as bg

    for path in warm:
        found = bg.load(path)
        found(**found.example)

    def load(path: str) -> None:
        str(bg.load(path))

    return load
