"""The search of `Fit`: alternatives alone first, then combinations, in the order of what is expected of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

from bmgraph.errors import BackendError, BmgraphError, OrderError, PassError, VerificationError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context, Trial
from bmgraph.pass_manager.ordering import check_order, holds
from bmgraph.passes.fit.alternatives import Alternative, Key, combinations, passes_of
from bmgraph.passes.fit.budget import Budget
from bmgraph.passes.fit.measurement import Measurement
from bmgraph.passes.fit.plan import Candidate, FitPlan
from bmgraph.utils.memory_budget import memory_budget

RECOVERED = 0.5
"""The share of drift that training is expected to leave: what is measured decides."""

MARGIN = 1.02
"""How far beyond the budget what is expected may be and is tried all the same."""


@dataclass(frozen=True)
class Expected:
    """What is expected of a combination before it runs, relative to nothing: bytes, milliseconds, drift."""

    bytes: float
    milliseconds: float | None
    drift: float


class Search:
    """Looks for the combination that drifts least within a budget.

    Each alternative is tried alone. Of a combination it is then expected that sizes and times shrink by the same shares and
    squared drifts add up, from the longest beginning of it that was measured on; the next to be tried is the one with the
    least drift of those that should fit, as long as that is less than what is known to fit. While nothing fits, the smallest is next.
    """

    def __init__(
        self,
        alternatives: Sequence[Alternative],
        budget: Budget,
        tries: int,
        program: Program,
        context: Context,
    ) -> None:
        self.alternatives, self.budget, self.left = alternatives, budget, tries
        self._program, self._context = program, context
        following = list(context.following)
        every = combinations(alternatives, lambda passes: holds(passes, context.provided))
        self.keys = [
            key for key in every if holds((*passes_of(alternatives, key), *following), context.provided)
        ]
        if not self.keys:
            try:
                check_order((*alternatives[0].passes, *following), has=context.provided)
            except OrderError as error:
                raise PassError(f"none of the passes in over= can stand here: {error}") from error
        self._measure = Measurement(program, context, budget.milliseconds is not None)
        self.known: dict[Key, Candidate] = {}
        self.refused: dict[Key, str] = {}
        self._trials: dict[Key, Trial] = {}
        self.best: Key | None = None

    def run(self) -> Trial | None:
        """The trial of the best combination that fits; None where none does. What was found is in `known` and `refused`."""
        self._note((), Candidate(*self._context.kept("what is given, measured", self._given)))
        if self.best is not None:
            return self._context.attempt(())
        for key in self.keys:
            if len(key) == 1 and not self.alternatives[key[0]].only_trains:
                self._try(key)
        while self.left > 0 and (following := self._next()) is not None:
            self._try(following)
        if self.best is None:
            self._weigh_nearest()
            return None
        return self._trial(self.best)

    def _given(self) -> tuple[Any, ...]:
        return astuple(self._measure.weighed(self._measure.of(self._program, ()), self._program))

    def plan(self, target: str) -> FitPlan:
        """What was found."""
        tried = self.known.keys() | self.refused.keys()
        return FitPlan(
            target, self.budget, tuple(self.known.values()),
            tuple((",".join(map(str, passes_of(self.alternatives, key))), why) for key, why in self.refused.items()),
            sum(key not in tried and not self._hopeless(key) for key in self.keys), self.left <= 0, self._measure.compared,
            None if self.best is None else self.known[self.best],
        )  # fmt: skip

    def _next(self) -> Key | None:
        """The combination to try next; None where no other is worth it."""
        open_keys = [key for key in self.keys if key not in self.known and not self._hopeless(key)]
        expected = {key: self._expected(key) for key in open_keys}
        used = {key: self.budget.used(item.bytes, item.milliseconds) for key, item in expected.items()}
        known = math.inf if self.best is None else self.known[self.best].drift
        likely = [key for key in open_keys if used[key] <= MARGIN and expected[key].drift < known]
        if likely:
            return min(likely, key=lambda key: (expected[key].drift, used[key]))
        if self.best is not None or not open_keys:
            return None
        key = min(open_keys, key=used.__getitem__)
        nearest = min(map(self._likely_used, self.known.values()))
        return key if used[key] < nearest else None

    def _expected(self, key: Key) -> Expected:
        """What is expected of a combination."""
        start = next(cut for cut in range(len(key), -1, -1) if key[:cut] in self.known)
        base, found = self.known[()], self.known[key[:start]]
        size, milliseconds, drift = float(found.weights), found.milliseconds, found.drift
        for number in key[start:]:
            one = self.known.get((number,))
            if self.alternatives[number].only_trains:
                drift *= RECOVERED
            elif one is not None:
                size *= one.weights / base.weights
                drift = math.hypot(drift, one.drift)
                if milliseconds is not None and one.milliseconds is not None and base.milliseconds:
                    milliseconds *= one.milliseconds / base.milliseconds
        beside = found.bytes - found.weights if found.files is not None else base.bytes - base.weights
        return Expected(size + beside, milliseconds, drift)

    def _hopeless(self, key: Key) -> bool:
        """Whether a combination begins with one that cannot run, or holds an alternative that cannot run alone."""
        cuts = (key[:cut] for cut in range(1, len(key) + 1))
        return any(cut in self.refused for cut in cuts) or any((number,) in self.refused for number in key)

    def _try(self, key: Key) -> None:
        """Run a combination, on the trial of its beginning, which is tried first, and measure it."""
        if len(key) > 1 and key[:-1] not in self.known:
            self._try(key[:-1])
            if key[:-1] in self.refused:
                return
        self.left -= 1
        texts = tuple(map(str, passes_of(self.alternatives, key)))
        found = self._context.kept(f"measures after {','.join(texts)}", partial(self._measured, key, texts))
        if isinstance(found, str):
            self.refused[key] = found
        else:
            self._note(key, Candidate(*found))

    def _measured(self, key: Key, texts: tuple[str, ...]) -> tuple[Any, ...] | str:
        """The fields of a combination's candidate, or why it cannot run."""
        try:
            trial = self._trial(key)
            found = self._measure.of(trial.program, texts)
            if self._improves(found):
                found = self._measure.weighed(found, trial.program)
        except (PassError, VerificationError, BackendError) as error:
            self._trials.pop(key, None)
            return _first_line(error)
        return astuple(found)

    def _trial(self, key: Key) -> Trial:
        """The trial of a combination, which runs again where its program was dropped, or an earlier run has measured it."""
        if key not in self._trials:
            before = self._trial(key[:-1]) if len(key) > 1 else None
            self._trials[key] = self._context.attempt(self.alternatives[key[-1]].passes, before)
        return self._trials[key]

    def _improves(self, found: Candidate) -> bool:
        """Whether a candidate fits and drifts less than the best so far."""
        fits = self._used(found) <= 1
        return fits and (self.best is None or found.drift < self.known[self.best].drift)

    def _weigh_nearest(self) -> None:
        """Let the bytes of the nearest be those of its engine's files, as they are of what fits."""
        for key in sorted(filter(None, self.known), key=lambda key: self._likely_used(self.known[key])):
            nearest = min(map(self._likely_used, self.known.values()))
            if self._likely_used(self.known[key]) > nearest:
                continue  # another is, since it was weighed
            try:
                self.known[key] = self._measure.weighed(self.known[key], self._trial(key).program)
            except BackendError as error:
                self.refused[key] = _first_line(error)
                del self.known[key]

    def _used(self, found: Candidate) -> float:
        return self.budget.used(found.bytes, found.milliseconds)

    def _likely_used(self, found: Candidate) -> float:
        """The same, where files that were not built have as much beside weights as those of the program as it is."""
        beside = 0 if found.files is not None else self.known[()].bytes - self.known[()].weights
        return self.budget.used(found.bytes + beside, found.milliseconds)

    def _note(self, key: Key, found: Candidate) -> None:
        """Remember a candidate, and drop the oldest programs where they take too much memory."""
        if self._improves(found):
            self.best = key
        self.known[key] = found
        while sum(
            self.known[other].bytes for other in self._trials if other in self.known
        ) > memory_budget() and (
            oldest := next((other for other in self._trials if other not in (self.best, key)), None)
        ):
            del self._trials[oldest]


def _first_line(error: BmgraphError) -> str:
    return str(error).splitlines()[0]
