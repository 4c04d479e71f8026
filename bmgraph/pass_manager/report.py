"""Report: what a compilation did, pass by pass, and how the engine compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from bmgraph.ir.pass_record import Record
from bmgraph.verify.weight_only_check import NO_ROOM

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

LONGEST = 400
"""Characters of a pass in a report: histories hold all."""


@dataclass
class Report:
    """The record of every pass, and the engine against the program that it was lowered from.

    `engine_drift` is the relative L2 distance of the engine's outputs from the program's on torch, `total_drift` from the
    captured model's (None where not compared); `total_cosine` their cosine; `bytes` the size of the engine's files;
    `seconds` the time of each stage.
    """

    records: tuple[Record, ...] = ()
    backend: str = ""
    engine_drift: float | None = None
    total_drift: float | None = None
    total_cosine: float | None = None
    bytes: int | None = None
    weights: str = ""
    """Digest of the weights of the program that the engine was built from."""
    seconds: dict[str, float] = field(default_factory=dict)
    rewrites: list[tuple[str, int]] = field(default_factory=list)
    """Rewrites of the engine stage: (name, how often it matched)."""
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The report as plain numbers, strings, lists and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        console = Console(file=text, width=120, no_color=True)
        console.print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title="passes", title_justify="left")
        for name in ("pass", "edits", "declined", "MB", "drift", "in all"):
            table.add_column(name, justify="left" if name == "pass" else "right", overflow="fold")
        for record in self.records:
            indent = "  " if record.within else ""
            table.add_row(
                Text(indent + _short(record.text)), str(len(record.edits)), str(len(record.declined)),
                f"{record.after.bytes / 1e6:.1f}" if record.after else "", _number(record.drift), _number(record.cumulative),
            )  # fmt: skip
        lines: list[RenderableType] = [table] if self.records else []
        for stage, what in (("model", "an output, on batches of "), ("step", "")):
            compared = {
                item.compared for item in self.records if item.drift is not None and item.stage == stage
            }
            if compared:
                lines.append(
                    Text(f"drift: largest relative L2 change of {what}{', '.join(sorted(compared))}")
                )
        lines += [Text(f"{item.text}: {item.compared}") for item in self.records if NO_ROOM in item.compared]
        lines += [Text(line) for line in _declined(self.records)]
        if self.rewrites:
            lines.append(Text("engine: " + ", ".join(f"{name} x{count}" for name, count in self.rewrites)))
        if self.backend:
            size = f", {self.bytes / 1e6:.1f} MB" if self.bytes is not None else ""
            drift = f", drift from the program {_number(self.engine_drift)}, from the model {_number(self.total_drift)} (cosine {_number(self.total_cosine)})"
            lines.append(
                Text(
                    f"{self.backend} engine{size}{drift if self.engine_drift is not None else ', not compared'}"
                )
            )
        if self.seconds:
            lines.append(
                Text("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items()))
            )
        lines += [Text(note) for note in self.notes]
        return Group(*lines)


def _declined(records: tuple[Record, ...]) -> list[str]:
    """One line for each reason for which sites were declined."""
    lines = []
    for record in records:
        reasons: dict[str, list[str]] = {}
        for edit in record.declined:
            reasons.setdefault(edit.what, []).append(edit.site)
        for why, sites in reasons.items():
            more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
            lines.append(f"{_short(record.text)} declined {sites[0]}{more}: {why}")
    return lines


def _short(text: str) -> str:
    """A pass with its first options: those that were searched for may be hundreds."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"
