"""FitPlan: what each combination of passes that was tried costs and how far it drifts, and which is chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from bmgraph.passes.fit.budget import Budget, size_up

if TYPE_CHECKING:
    from rich.console import Group

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Candidate:
    """Passes, and what the program is after them.

    `weights` are the bytes of the weights that an engine stores, `files` those of the engine's files, None where none was built. `flops` are of one run on the
    example. `drift` is the relative L2 distance of the outputs from those before all passes, `cosine` their cosine.
    `milliseconds` is the time of a call on the example, of an engine that generates of one new token; None where no latency is asked for.
    """

    passes: tuple[str, ...]
    weights: int
    flops: int
    drift: float
    cosine: float
    milliseconds: float | None = None
    files: int | None = None

    @property
    def bytes(self) -> int:
        """The bytes that count: of the engine's files where they are known, else of the weights."""
        return self.weights if self.files is None else self.files

    @property
    def text(self) -> str:
        """The passes as a text."""
        return ",".join(self.passes) or AS_IT_IS


@dataclass(frozen=True)
class FitPlan:
    """The curve of a search: `candidates` in the order in which they were tried, the program as it is first.

    `refused` are combinations that cannot run, with what was said; `untried` is the number of those that were not tried, since they
    are expected to drift farther or to need more, or, with `ended`, since as many as were asked for have run. `compared` says on what drift was measured; `chosen` is None where nothing that was tried fits.
    """

    target: str
    budget: Budget
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]
    untried: int
    ended: bool
    compared: str
    chosen: Candidate | None

    @property
    def passes(self) -> str:
        """The chosen passes as a text, which `bmgraph compile --passes` takes; empty where nothing has to be done, or nothing fits."""
        return ",".join(self.chosen.passes) if self.chosen is not None else ""

    @property
    def nearest(self) -> Candidate:
        """The candidate that uses least of the budget; of those of which an engine was built, if one was built for any."""
        built = [item for item in self.candidates if item.files is not None]
        return min(built or self.candidates, key=self._used)

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates than which no other uses less of the budget and drifts no farther, from large to small (Pareto front)."""
        found: list[Candidate] = []
        for item in sorted(self.candidates, key=lambda item: (item.drift, self._used(item))):
            if not found or self._used(item) < self._used(found[-1]):
                found.append(item)
        return tuple(found)

    def missed(self) -> str:
        """What to say where nothing fits: the nearest, and what to do."""
        near = self.nearest
        size = size_up(near.bytes) + (
            f" and {near.milliseconds:.4g} ms" if near.milliseconds is not None else ""
        )
        said = (
            f"{self.budget.text} cannot be met by these passes on {self.target}: the nearest is {size}, {near.text} "
            f"(drift {near.drift:.3g}); give {self.budget.enough(near.bytes, near.milliseconds)}, or passes in over= that save more"
        )
        if self.untried and self.ended:
            said += f"; {self._left()}"
        if self.refused:
            said += f"; {len(self.refused)} cannot run, such as {self.refused[0][0]}: {self.refused[0][1]}"
        return said

    def _left(self) -> str:
        """What is said of those that were not tried."""
        why = (
            "tries= combinations have run: raise it to try more"
            if self.ended
            else "they are expected to drift farther or to need more"
        )
        return f"{self.untried} combinations were not tried: {why}"

    def as_json(self) -> dict[str, object]:
        """The plan as plain numbers, strings, lists and dicts."""
        return asdict(self)

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120, no_color=True).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        timed = self.budget.milliseconds is not None
        table = Table(title=f"plan for {self.target}", title_justify="left")
        for name in ("passes", "bytes", "GFLOPs", *(("ms",) if timed else ()), "drift", "cosine", ""):
            table.add_column(name, justify="left" if name in ("passes", "") else "right", overflow="fold")
        front = self.front
        weighed = any(item.files is not None for item in self.candidates)
        for item in sorted(self.candidates, key=lambda item: -self._used(item)):
            marks = ["on the front"] if item in front else []
            marks += ["chosen"] if item == self.chosen else []
            time = "" if item.milliseconds is None else f"{item.milliseconds:.2f}"
            size = ("" if item.files is not None or not weighed else "~") + size_up(item.bytes)
            table.add_row(
                Text(item.text), size, f"{item.flops / 1e9:.3g}", *((time,) if timed else ()),
                f"{item.drift:.4f}", f"{item.cosine:.4f}", ", ".join(marks),
            )  # fmt: skip
        lines = [Text(f"drift: relative L2 change of the outputs, on {self.compared}")]
        if weighed and not all(item.files is not None for item in self.candidates):
            lines.append(Text("bytes: of the engine's files; ~ of its weights alone"))
        lines += [Text(f"cannot run: {passes}: {why}") for passes, why in self.refused]
        if self.untried:
            lines.append(Text(self._left()))
        if self.chosen is None:
            lines.append(Text(self.missed()))
        return Group(table, *lines)

    def _used(self, item: Candidate) -> float:
        return self.budget.used(item.bytes, item.milliseconds)
