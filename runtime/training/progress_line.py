"""One line of a training loop's progress: a live one on a terminal, else a line every few steps."""

from __future__ import annotations

import sys
from typing import Any

from bmgraph.runtime.training.metrics import Record


class ProgressLine:
    """Shows the step, the loss and the speed on the error stream; shows nothing if not `shown` (ranks above 0)."""

    def __init__(self, begin: int, steps: int, every: int, shown: bool = True) -> None:
        self._steps, self._every, self._shown = steps, every, shown
        self._bar: Any = None
        self._task: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(20),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=steps, completed=begin)

    def __enter__(self) -> ProgressLine:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, record: Record) -> None:
        """Show a step."""
        text = summary(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"], description=text)
        elif (
            self._shown
            and self._every
            and (record["step"] % self._every == 0 or record["step"] == self._steps)
        ):
            self.say(f"step {record['step']}/{self._steps} {text}")

    def say(self, text: str) -> None:
        """Show a line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)


def summary(record: Record) -> str:
    """Loss, rate, speed and memory of a step, as far as they are known."""
    parts = [f"loss {record['loss']:.4f}", f"rate {record['rate']:.3g}"]
    if record.get("skipped"):
        parts.append("not finite, skipped")
    if record.get("norm") is not None:
        parts.append(f"norm {record['norm']:.3g}")
    for unit in ("tokens", "items"):
        speed = record.get(f"{unit}_per_second")
        if speed is not None:
            parts.append(f"{speed:,.0f} {unit}/s")
            break
    if record.get("memory") is not None:
        parts.append(f"{record['memory'] / 1e9:.2f} GB")
    return ", ".join(parts)
