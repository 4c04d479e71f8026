"""Report: what a compilation did, pass by pass, and how the engine compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from bmgraph.ir.pass_record import VERSION, Record
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
    `milliseconds_before` what a call of the program before all passes took on torch, `milliseconds` one of the engine, medians of runs in
    turn on what `timed` says (None where the two take other inputs, or nothing was compared); `seconds` the time of each stage.
    """

    records: tuple[Record, ...] = ()
    backend: str = ""
    engine_drift: float | None = None
    total_drift: float | None = None
    total_cosine: float | None = None
    bytes: int | None = None
    milliseconds_before: float | None = None
    milliseconds: float | None = None
    timed: str = ""
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
        for name in ("pass", "edits", "MB", "GFLOPs", "drift", "in all"):
            table.add_column(name, justify="left" if name == "pass" else "right", overflow="fold")
        started = next((record.before for record in self.records if record.before is not None), None)
        if started is not None:
            table.add_row("(before)", "", _mega(started.bytes), _giga(started.flops), "", "")
        for record in self.records:
            indent = "  " if record.within else ""
            table.add_row(
                Text(indent + _short(record.text)), str(len(record.edits)),
                _mega(record.after.bytes) if record.after else "", _giga(record.after.flops) if record.after else "", _number(record.drift), _number(record.cumulative),
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
        lines += [Text(line) for line in _saved_nothing(self.records)]
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
        if self.milliseconds is not None and self.milliseconds_before is not None:
            ratio = self.milliseconds_before / max(self.milliseconds, 1e-9)
            lines.append(
                Text(
                    f"time of a call: {self.milliseconds_before:.2f} ms before (the program on torch), {self.milliseconds:.2f} ms with the "
                    f"engine: {ratio:.2f} times as fast (medians, on {self.timed}; bg.benchmark measures better)"
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


def _saved_nothing(records: tuple[Record, ...]) -> list[str]:
    """One line for each pass that was meant to save something, after which the program is as large and computes as much as before."""
    lines = []
    for record in records:
        before, after = record.before, record.after
        if record.within or not record.saves or before is None or after is None:
            continue
        if after.bytes >= before.bytes and after.flops >= before.flops:
            lines.append(
                f"{_short(record.text)} saved nothing on {record.target.partition(VERSION)[0]}: {_giga(before.flops)} GFLOPs before and "
                f"{_giga(after.flops)} after it, and no fewer bytes are stored"
            )
    return lines


def _mega(size: int) -> str:
    return f"{size / 1e6:.1f}" if size >= 1e6 else f"{size / 1e6:.2g}"


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3g}" if flops >= 1e6 else f"{flops / 1e9:.2g}"


def _short(text: str) -> str:
    """A pass with its first options: those that were searched for may be hundreds."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value >= 1e-4 or value == 0 else f"{value:.1e}"
