"""RunMeasure: what `fit` measures of a trainer as a whole beside the loss of its batches, such as of the texts that it writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer


class RunMeasure(ABC):
    """Figures of a trainer at a step. `names`: those that it gives, of each of which more is better."""

    names: tuple[str, ...]

    @abstractmethod
    def of(self, trainer: Trainer) -> Mapping[str, float]:
        """The figures by name; called on all ranks."""
