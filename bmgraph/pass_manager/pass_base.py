"""Pass, ModelPass and StepPass: frozen dataclasses whose fields are options and whose class variables are the contract."""

from __future__ import annotations

from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from bmgraph.errors import InputError
from bmgraph.pass_manager.option_types import fits, type_in_words
from bmgraph.pass_manager.pass_spec import known_options, name_of, pass_text

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.pass_manager.context import Context
    from bmgraph.training.step_program import StepProgram
    from bmgraph.verify.measures import Measure
    from bmgraph.verify.proof import Proof

Stage = Literal["model", "step"]
STAGES: tuple[Stage, ...] = ("model", "step")
"""What passes rewrite, in the order that they run in: the program, then the training step that is traced of it."""

FINAL = "final"
"""Provided by a pass after which no other may rewrite the model."""

FOR_ENGINES = "for engines alone"
"""Provided by a pass whose program no trainer takes: passes of the training step are refused behind it."""

Effect = Literal["exact", "approximate", "intended"]
"""exact: outputs stay the same up to rounding; approximate: they drift within a bound; intended: they are meant to change."""


class PassType(ABCMeta):
    """The type of pass classes: it takes the names that other libraries have for options, and refuses unknown ones."""

    def __call__(cls, *args: object, **options: object) -> Any:
        """Make a pass. Raises InputError for an unknown option, and for one that is given by two names."""
        kind: Any = cls
        return super().__call__(*args, **known_options(kind, options))


@dataclass(frozen=True, repr=False)
class Pass(metaclass=PassType):
    """What passes of both stages have: options in their fields, a contract in their class variables.

    Derive a pass from `ModelPass` or `StepPass`, as a frozen dataclass. It only rewrites: the pass manager checks
    contracts, verifies, measures drift and cost, and writes the history. Options are numbers, strings and tuples of
    them; a list becomes a tuple, a table one of pairs, and one string or integer a tuple where that is expected. Data and models are
    named and asked of the context. Raises InputError for an unknown option.
    """

    acts_on: ClassVar[Stage]
    effect: ClassVar[Effect] = "exact"
    requires: ClassVar[frozenset[str]] = frozenset()
    """What earlier passes must have provided."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """What the pass adds to the program, by name."""
    conflicts: ClassVar[frozenset[str]] = frozenset()
    """What must not be provided yet when the pass runs."""
    default_drift: ClassVar[float] = 0.0
    """For an approximate pass: the bound on the relative L2 change of each output, or of each gradient of a step."""
    saves: ClassVar[bool] = False
    """Whether the pass is meant to make the program smaller or faster: reports say where it did neither."""
    may_match_nothing: ClassVar[bool] = False
    """Whether a run that edits nothing is allowed."""
    other_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What other libraries call an option -> its name here; both are taken."""
    not_options: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What might be expected as an option and cannot be one -> why, and what to do instead."""
    version: ClassVar[int] = 1
    """The version of the defaults. Histories say it, so that one who changes a default raises it and tells the former one."""
    former_defaults: ClassVar[Mapping[int, Mapping[str, object]]] = MappingProxyType({})
    """Version -> options that have, or had, another default in the next version -> their values in this one."""

    @classmethod
    def of_version(cls, version: int, options: Mapping[str, object]) -> Mapping[str, object]:
        """The options that mean what those of a text of an earlier version did, beyond `former_defaults`, which they hold."""
        return options

    def __post_init__(self) -> None:
        annotations = _annotations(type(self))
        for field in fields(self):
            value = _as_tuples(getattr(self, field.name))
            if isinstance(field.default, tuple) and isinstance(value, (str, int)):
                value = (value,)
            object.__setattr__(self, field.name, value)
            _check_option(type(self), field.name, value)
            wanted = annotations.get(field.name)
            if wanted is not None and not fits(value, wanted):
                raise InputError(
                    f"option {field.name!r} of {type(self).__name__} is {value!r}: give {type_in_words(wanted)}"
                )

    @property
    def excluded(self) -> frozenset[str]:
        """What must not be provided when the pass runs: its conflicts."""
        return self.conflicts

    @property
    def promises(self) -> Effect:
        """What the pass is held to: `effect`, unless its options ask for something else."""
        return self.effect

    @property
    def allowed_drift(self) -> float:
        """The bound of an approximate pass: `default_drift`, unless its options need another."""
        return self.default_drift

    @property
    def required(self) -> frozenset[str]:
        """What earlier passes must have provided: `requires`, unless the options of the pass make up for it."""
        return self.requires

    @property
    def name(self) -> str:
        """The name of the pass in its text form."""
        return name_of(type(self))

    @property
    def memory_limit(self) -> int | None:
        """How many bytes of weights may be in memory where a program with this pass is captured and run; None for no limit."""
        return None

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of the resources that this pass will ask for."""
        return ()

    def provides_with(self, resources: Mapping[str, object]) -> frozenset[str]:
        """What it provides on given resources, as far as they tell without running it: asked for orders that are offered."""
        return self.provides

    def __repr__(self) -> str:
        return pass_text(self)

    __str__ = __repr__


@dataclass(frozen=True, repr=False)
class ModelPass(Pass, ABC):
    """A rewrite of a program; subclasses are frozen dataclasses."""

    acts_on: ClassVar[Stage] = "model"
    changes: ClassVar[frozenset[str]] = frozenset()
    """What the pass changes without naming it in its edits, of `bmgraph.verify.unnamed_changes.ASPECTS`: what trains
    ("frozen"), ties, ranges of sizes, dropout, types of outputs, whether the program can train ("training"), and the
    values of all parameters that train ("tensors"). All else stays bit by bit, and the pass manager checks it."""
    trains: ClassVar[bool] = False
    """Whether the pass trains the program's own parameters: its backward is then compared with the model's."""

    @property
    def will_train(self) -> bool:
        """Whether the pass trains the program's own parameters: `trains`, unless its options decide that."""
        return self.trains

    @property
    def declared(self) -> frozenset[str]:
        """What the pass changes without naming it: `changes`, unless its options change more."""
        return self.changes

    @abstractmethod
    def run(self, program: Program, context: Context) -> Program:
        """Rewrite a program (a clone, which the pass may change) and return it. Raises PassError where it cannot."""

    def fits(self, program: Program, context: Context) -> bool:
        """Whether the pass was made for a program, told without running it: by names, shapes, fingerprints.

        Asked of the program that was given first, where the pass finds itself misplaced after others: if it fits, the
        error offers to run it first.
        """
        return False

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Compare what the pass made with what it should make, by other means than its rewrite: see `Proof.same`.

        The pass manager calls it after the pass, on the program before it (after the last pass that ran within it) and
        after it. Raises VerificationError.
        """
        return

    @property
    def measured(self) -> Measure | None:
        """For a pass that only replaces weights and rounds activations: what bounds it (`WeightsMoved`, `OutputsMoved`);
        everything else in the graph must then stay exact. None for a pass that changes more."""
        return None

    @property
    def excluded(self) -> frozenset[str]:
        """What must not be provided when the pass runs: its conflicts, and `FINAL`."""
        return self.conflicts | {FINAL}


@dataclass(frozen=True, repr=False)
class StepPass(Pass, ABC):
    """A rewrite of a training step (forward, loss and backward in one graph); subclasses are frozen dataclasses."""

    acts_on: ClassVar[Stage] = "step"

    @property
    def excluded(self) -> frozenset[str]:
        """What must not be provided when the pass runs: its conflicts, and `FOR_ENGINES`."""
        return self.conflicts | {FOR_ENGINES}

    @abstractmethod
    def run(self, step: StepProgram, context: Context) -> StepProgram:
        """Rewrite a step, whose tensors the pass takes, and return it. Raises PassError where it cannot."""

    def fits(self, step: StepProgram, context: Context) -> bool:
        """Whether the pass was made for a step, told without running it; see `ModelPass.fits`."""
        return False


def _annotations(kind: type[Pass]) -> dict[str, object]:
    """The types of a pass's options; none where an annotation names what cannot be found."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _as_tuples(value: object) -> object:
    """Lists as tuples, at any depth; a table as pairs of its keys and values."""
    if isinstance(value, Mapping):
        value = list(value.items())
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check_option(kind: type[Pass], name: str, value: object) -> None:
    if isinstance(value, tuple):
        for item in value:
            _check_option(kind, name, item)
    elif not (value is None or isinstance(value, (bool, int, float, str))):
        raise InputError(
            f"option {name!r} of {kind.__name__} is a {type(value).__name__}: options are numbers, strings and tuples "
            "of them; name data and models, and give them as resources={name: ...}"
        )
