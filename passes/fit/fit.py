"""Fit: the passes, of those that are given, that keep outputs best within a budget of bytes or of time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass, Pass
from bmgraph.passes import known_passes
from bmgraph.passes.fit.alternatives import Alternative, alternatives_of
from bmgraph.passes.fit.budget import Budget
from bmgraph.passes.fit.plan import FitPlan
from bmgraph.passes.fit.search import Search


@dataclass(frozen=True, repr=False)
class Fit(ModelPass):
    """Take those of the given passes that keep outputs best within a budget.

    bytes: of the engine's files, such as "60MB" or "512KiB"; without a backend (in a `Pipeline`) of the weights that an engine would store,
    which is a few percent less. latency: such as "20ms", of one call of the engine on the example, the median of runs in turn with
    the engine of the program as it is; of an engine that generates, of one new token behind prompts of the example's size. Give one or
    both. over: texts of passes (or passes), each of which is taken or not, in the order given: `"quantize{scheme=int8}"`. Passes in one text are
    taken together; `"quantize{scheme=int4,group=64|128}"` has two alternatives, of which one is taken at most, and so have passes whose
    contracts exclude each other. A pass that trains (`"distill{steps=500}"`) is tried behind others, where it recovers what they lost.
    tries: how many combinations run at most; see `Search` for which.

    Every combination that is tried runs with all checks of its passes, and with the passes that follow when its engine is
    built, but for those that train. What moves is measured on up to 4 calibration batches, else on the example: the relative L2 distance
    of the outputs from those of the program as it is, the largest of all outputs. The history has the records of the chosen
    passes alone, so a replay does not search; the report shows the curve, and `bg.plan` or `bmgraph compile --dry-run` show it
    before anything is built. Where the program fits as it is, nothing is done.

    Raises InputError for a budget or a text that cannot be read, PassError where no combination fits, with the nearest, and where a latency is
    asked for without an engine.

    Example:
        >>> import torch, bmgraph as bg
        >>> from bmgraph.passes import Fit
        >>> layer = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> program = bg.capture(layer, (torch.randn(8, 64),))
        >>> over = ("quantize{scheme=int8|int4,activations=none}", "shrink{ffn=0.5}")
        >>> small = bg.Pipeline([Fit(bytes="40KB", over=over)]).run(program)
        >>> [record.text for record in small.history]
        ['quantize@4{activations=none}']
    """

    effect: ClassVar[Effect] = "approximate"
    may_match_nothing: ClassVar[bool] = True

    bytes: str = ""
    latency: str = ""
    over: tuple[str | Pass, ...] = ()
    tries: int = 16

    def __post_init__(self) -> None:
        given = self.over if isinstance(self.over, (list, tuple)) else (self.over,)
        texts = tuple(str(item) if isinstance(item, Pass) else item for item in given)
        object.__setattr__(self, "over", texts)
        super().__post_init__()
        wrong = next((item for item in texts if not isinstance(item, str)), None)
        if wrong is not None or not texts:
            raise InputError(
                f"over={texts!r}: give texts of passes, such as over=('quantize{{scheme=int8}}', 'shrink{{ffn=0.25}}')"
            )
        found = self.alternatives  # raises for what cannot be read
        Budget.of(self.bytes, self.latency)
        nested = next((item for one in found for item in one.passes if isinstance(item, Fit)), None)
        if nested is not None:
            raise InputError(f"over= holds {nested}: a search within a search; give its passes here")
        if self.tries < len(found):
            raise InputError(
                f"tries={self.tries}: over= has {len(found)} alternatives, and each is tried alone: give at least {len(found)}"
            )

    @property
    def alternatives(self) -> list[Alternative]:
        """What may be taken. Raises InputError for a text that cannot be read."""
        return alternatives_of([str(item) for item in self.over], known_passes())

    @property
    def resources(self) -> tuple[str, ...]:
        """What any of the passes reads."""
        return tuple(dict.fromkeys(name for item in self.alternatives for name in item.resources))

    @property
    def will_train(self) -> bool:
        """Whether one of the passes trains."""
        return any(item.will_train for one in self.alternatives for item in one.passes)

    def run(self, program: Program, context: Context) -> Program:
        """Search, and let what was chosen stand in the place of this pass."""
        search = self._search(program, context)
        found = search.run()
        plan = search.plan(context.target.name)
        if found is None:
            raise PassError(plan.missed())
        context.note(str(plan))
        context.settle(found)
        return found.program

    def plan(self, program: Program, context: Context) -> FitPlan:
        """What would be chosen, and the curve; see `bg.plan`."""
        search = self._search(program, context)
        search.run()
        return search.plan(context.target.name)

    def _search(self, program: Program, context: Context) -> Search:
        budget = Budget.of(self.bytes, self.latency)
        return Search(self.alternatives, budget, self.tries, program, context)
