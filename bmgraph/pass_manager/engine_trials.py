"""What a pass can ask of the target: engines of candidates, their files' bytes and their times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from bmgraph.ir.program import Program


@dataclass(frozen=True)
class TrialEngine:
    """An engine that was built to be measured: the bytes of its files, None where they are not known, and why it cannot run here,
    empty if it can."""

    engine: object
    bytes: int | None
    unable: str = ""


class EngineTrials(ABC):
    """Builds engines of programs for the target of a compilation, and times them. The compiler gives one to the pass manager."""

    @abstractmethod
    def build(self, program: Program) -> TrialEngine:
        """The engine of a program, which is not compared with it. Raises BackendError."""

    @abstractmethod
    def milliseconds(self, engines: Mapping[str, TrialEngine]) -> dict[str, float]:
        """The median time of each on its example, in turn; of engines that generate, for one new token."""
