"""What a training loop measures, as JSON lines and for TensorBoard; written by rank 0."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import InputError

Record = dict[str, Any]
"""Figures by name: numbers, and dicts of them."""


class Metrics:
    """Appends records to a file of JSON lines, and to TensorBoard's where a folder is given and it is installed.

    A file that cannot be written is told once, and does not stop training.
    """

    def __init__(
        self, path: Path | None, tensorboard: Path | None, step: int, tell: Callable[[str], None]
    ) -> None:
        """`step`: the last one made; what a file holds of later steps, of a run that was interrupted, is removed."""
        self._tell = tell
        self._path = path
        self._board = _summary_writer(tensorboard, step) if tensorboard is not None else None
        if path is not None:
            self._guarded(lambda: _cut(path, step))

    def write(self, record: Record) -> None:
        """Write one record; its "step" places it."""
        path, clean = self._path, _finite(record)
        if path is not None:
            self._guarded(lambda: _append(path, clean))
        if self._board is not None:
            for name, value in _flat(clean):
                if name != "step":
                    self._board.add_scalar(name, value, clean["step"])

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self._board is not None:
            self._board.close()

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            self._tell(f"metrics are no longer written to {self._path}: {error.strerror}")
            self._path = None


def tensorboard_is_installed() -> bool:
    """Whether records can be written for TensorBoard."""
    return find_spec("tensorboard") is not None


def _summary_writer(folder: Path, step: int) -> Any:
    if not tensorboard_is_installed():
        raise InputError(
            f"tensorboard={str(folder)!r}: TensorBoard is not installed: pip install tensorboard"
        )
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)  # type: ignore[no-untyped-call]


def _append(path: Path, record: Record) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _cut(path: Path, step: int) -> None:
    """Keep the whole lines of a file that are of steps up to `step`, or none for 0; makes its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that a killed process did not complete
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            kept.append(line + "\n")
    aside = path.with_name(f".{path.name}.new")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _finite(value: Any) -> Any:
    """Values of JSON, which has no NaN: null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value


def _flat(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found.append((prefix + key, value))
    return found


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that this process has held: of the GPU if it trains there, else of the host; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


class Clock:
    """Seconds since it was last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def read(self) -> float:
        """Seconds since the last reading."""
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        return passed
