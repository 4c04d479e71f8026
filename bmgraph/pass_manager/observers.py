"""Observers: what is told of every pass that ran, and three that keep times, operator counts and texts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bmgraph.ir.pass_record import Record
from bmgraph.ir.printer import target_text
from bmgraph.ir.program import Program
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.training.step_program import StepProgram

Subject = Program | StepProgram


class Observer(Protocol):
    """Called after every pass, once it has run and been verified."""

    def after(self, item: Pass, before: Subject, program: Subject, record: Record, seconds: float) -> None:
        """`before` and `program` are what the pass rewrote, before and after it: a program or, of a pass of the step stage, a
        step, whose values are gone from `before`; `seconds` include its verification."""


@dataclass
class Timing:
    """Collects (text of the pass, seconds) for every pass."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    def after(self, item: Pass, before: Subject, program: Subject, record: Record, seconds: float) -> None:
        self.seconds.append((str(item), seconds))


@dataclass
class OperatorDiff:
    """Collects how many calls of each operator every pass added (or removed, below 0)."""

    changes: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    def after(self, item: Pass, before: Subject, program: Subject, record: Record, seconds: float) -> None:
        old, new = _operators(before), _operators(program)
        names = sorted({*old, *new})
        self.changes.append(
            (str(item), {n: new.get(n, 0) - old.get(n, 0) for n in names if new.get(n, 0) != old.get(n, 0)})
        )


@dataclass
class Dump:
    """Writes the program after every pass, and its diff to the one before, to a folder as text."""

    folder: Path
    count: int = 0

    def after(self, item: Pass, before: Subject, program: Subject, record: Record, seconds: float) -> None:
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        old, new = str(before), str(program)
        stem = f"{self.count:02d}-{item.name}"
        (folder / f"{stem}.txt").write_text(new, encoding="utf-8")
        difference = difflib.unified_diff(old.splitlines(True), new.splitlines(True), "before", "after", n=2)
        (folder / f"{stem}.diff").write_text("".join(difference), encoding="utf-8")
        self.count += 1


def _operators(program: Subject) -> dict[str, int]:
    counts: dict[str, int] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "call_function":
                name = target_text(node.target)
                counts[name] = counts.get(name, 0) + 1
    return counts
