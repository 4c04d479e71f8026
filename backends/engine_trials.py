"""Engines that a backend builds for passes that measure on the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bmgraph.backends.auto.times import times_in_turn
from bmgraph.ir.program import Program
from bmgraph.pass_manager.engine_trials import EngineTrials, TrialEngine
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.engine_base import Engine

if TYPE_CHECKING:
    from bmgraph.backends.backend_base import Backend
    from bmgraph.runtime.training.trainer import Trainer


@dataclass(frozen=True)
class BackendTrials(EngineTrials):
    """Builds engines of one backend."""

    backend: Backend[Engine | Trainer]

    def build(self, program: Program) -> TrialEngine:
        """The engine of a program. Raises BackendError."""
        engine = self.backend.build(program, Report(records=program.history))
        assert isinstance(engine, Engine), "a backend that trains builds no engines"
        return TrialEngine(engine, engine.report.bytes, engine.unable)

    def milliseconds(self, engines: Mapping[str, TrialEngine]) -> dict[str, float]:
        """The median time of each on its example, in turn; of engines that generate, for one new token."""
        held = {name: item.engine for name, item in engines.items() if isinstance(item.engine, Engine)}
        found, new = times_in_turn(held)
        return {name: found.median(name) / (new or 1) for name in held}
