"""What a pass is: a frozen dataclass whose fields are its options and whose class says its contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bmgraph.errors import InputError
from bmgraph.pass_manager.pass_spec import name_of, pass_text

if TYPE_CHECKING:
    from bmgraph.pass_manager.context import Context

Stage = Literal["model", "step", "engine"]
STAGES: tuple[Stage, ...] = ("model", "step", "engine")

FINAL = "final"
"""What a pass provides after which no other may rewrite the model."""

Effect = Literal["exact", "approximate", "intended"]
"""exact: outputs stay but for rounding; approximate: they drift within a bound; intended: they are meant to change."""


@dataclass(frozen=True, repr=False)
class Pass(ABC):
    """A rewrite of a program; subclasses are frozen dataclasses and say their contract in class variables.

    A pass only rewrites: contracts, verification, drift, cost and history are the pipeline's work. Its options
    are numbers, strings and tuples of them; data and models are named and asked of the context.
    """

    acts_on: ClassVar[Stage] = "model"
    effect: ClassVar[Effect] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset()
    """What an earlier pass must have provided."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """What the program has after the pass."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """What the program must not have when the pass runs."""
    default_drift: ClassVar[float] = 0.0
    """The bound of an approximate pass on the relative L2 change of each output."""
    weight_drift: ClassVar[float | None] = None
    """For a pass that only replaces weights and rounds activations: the bound on the relative change of each row of
    a weight. The rest of the graph is then held to be exact. None for a pass that changes more."""
    may_match_nothing: ClassVar[bool] = False
    """Whether a run without a single edit is no error."""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_option(type(self), field.name, getattr(self, field.name))

    @abstractmethod
    def run(self, program: Any, context: Context) -> Any:
        """Rewrite a program, a clone that the pass may change, and return it.

        Raises PassError where the pass cannot do its work.
        """

    @property
    def excluded(self) -> frozenset[str]:
        """What the program must not have when the pass runs; for one that rewrites the model also that it is final."""
        return self.conflicts | {FINAL} if self.acts_on == "model" else self.conflicts

    @property
    def name(self) -> str:
        """The name of the pass in text."""
        return name_of(type(self))

    @property
    def resources(self) -> tuple[str, ...]:
        """The named resources that this pass will ask for."""
        return ()

    def __repr__(self) -> str:
        return pass_text(self)

    __str__ = __repr__


def _check_option(kind: type[Pass], name: str, value: Any) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_option(kind, name, item)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise InputError(
            f"option {name!r} of {kind.__name__} is a {type(value).__name__}: options are numbers, strings and tuples "
            "of them; name data and models, and give them as resources={name: ...}"
        )
