"""Settings of a run of passes, for passes of both stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bmgraph.errors import InputError
from bmgraph.pass_manager.context import TrainInPass
from bmgraph.pass_manager.engine_trials import EngineTrials
from bmgraph.pass_manager.observers import Observer
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.pass_manager.target import TORCH, Target

Verify = Literal["off", "structure", "numeric"]
"""off: nothing is checked; structure: what a pass made is legal; numeric: what it computes is compared too."""

LEVELS = ("off", "structure", "numeric")


@dataclass(frozen=True)
class RunSettings:
    """What passes are run with and held to.

    `max_drift` bounds the drift (relative L2) of every approximate pass and of all together, in place of each pass's own
    bound. `trainer` is what passes train with. Raises InputError for an unknown level of `verify`.
    """

    resources: Mapping[str, object] = field(default_factory=dict)
    max_drift: float | None = None
    verify: Verify = "numeric"
    target: Target = TORCH
    observers: Sequence[Observer] = ()
    trainer: TrainInPass | None = None
    trains: bool = False
    """Whether the program will be trained: gradients are compared then, too."""
    engines: EngineTrials | None = None
    """Builds and times engines for passes that measure on the target; None where no engine is built."""
    added: Sequence[Pass] = ()
    """The passes that a backend has added to the user's: no order that is offered names them."""
    tell: Callable[[str], None] | None = None
    """Is given what passes tell the user."""

    def __post_init__(self) -> None:
        if self.verify not in LEVELS:
            raise InputError(f"verify={self.verify!r}: choose one of {', '.join(map(repr, LEVELS))}")
