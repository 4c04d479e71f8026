"""Context: what a pass asks for (resources, calibration, training, other passes) and reports to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch

from bmgraph.analysis.interpreter import Observed
from bmgraph.errors import InputError, ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.pass_record import Edit, Record
from bmgraph.pass_manager.engine_trials import TrialEngine
from bmgraph.pass_manager.layer_calibration import LayerPart, calibrate_layers, check_finite
from bmgraph.pass_manager.target import TORCH, Target
from bmgraph.utils.digest import DigestedBatches, contents_digest, digest
from bmgraph.utils.progress import track
from bmgraph.verify.gradients import GradientMap

if TYPE_CHECKING:
    from bmgraph.ir.program import Program
    from bmgraph.pass_manager.pass_base import ModelPass, Pass, StepPass
    from bmgraph.pass_manager.resume_folder import Work
    from bmgraph.training.step_program import StepProgram

Value = TypeVar("Value")

CALIBRATION, TRAINER = "calibration", "trainer"


@dataclass(frozen=True)
class Trained:
    """A program after training, and the loss of each step."""

    program: Program
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """What passes made of a program when they were tried, with all their checks; `records` are theirs, and those of the passes that
    ran within them. `run` is for whoever runs passes."""

    program: Program
    records: tuple[Record, ...]
    run: object


TrainInPass = Callable[[object, "Program", Iterable[Mapping[str, torch.Tensor]], int], Trained]
"""Trains a program on batches, a step each, with the resource "trainer" or, where that is None, by default."""


@dataclass
class Context:
    """Given to `Pass.run`; collects what the pass did.

    `nested` runs another pass as a part of this one, with all its checks; `trainer` is what `train` trains with; `tried`, `lowered`
    and `tell` are what `attempt`, `engine` and `note` use. All are set by whoever runs the pass.
    """

    resources: Mapping[str, object] = field(default_factory=dict)
    target: Target = TORCH
    nested: Callable[[Pass, object, Mapping[str, object]], Program | StepProgram] | None = None
    trainer: TrainInPass | None = None
    proves: bool = False
    """Whether `ModelPass.prove` runs after the pass."""
    following: Sequence[Pass] = ()
    """The passes of this stage that run after this one."""
    provided: frozenset[str] = frozenset()
    """What the passes before this one provide."""
    tried: Callable[[Sequence[ModelPass], Trial | None], Trial] | None = None
    lowered: Callable[[Program], TrialEngine] | None = None
    """Builds the engine of a program, after the passes behind this one; None where no engine is built."""
    timed: Callable[[Mapping[str, TrialEngine]], dict[str, float]] | None = None
    """The median milliseconds of engines, in turn; None where no engine is built."""
    tell: Callable[[str], None] | None = None
    edits: list[Edit] = field(default_factory=list)
    declines: list[Edit] = field(default_factory=list)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, GradientMap] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    settled: Pass | Trial | None = None
    """The pass with what it has measured and chosen as options, which the history records in its place, or what passes made that
    it has tried: these then stand in its place."""
    read: dict[str, Any] = field(default_factory=dict)
    """What was read from the files that resources name: read once, since a file may be saved anew before it is used again."""
    work: Work | None = None
    """Where what `kept` finds is kept; None where nothing is."""
    lent: frozenset[str] = frozenset()
    """The resources that a pass around this one made."""

    def kept(self, what: str, make: Callable[[], Value]) -> Value:
        """What `make()` gives; in a run that can be resumed (`resume=`) it is kept, and a run that goes on does not make it again.

        For what takes long: the codes of a layer, ranges over all batches. It is numbers, texts, tensors, or tables (`dict`), tuples
        and lists of these; it follows from the program, the pass and what is read of resources through this context, and
        `make` does nothing else: sites are edited and reported by what it gives. `what` says what it is; calls come in the
        same order in each run.
        """
        return make() if self.work is None else self.work.kept(what, self, make)

    def reread(self, name: str, count: int | None) -> str:
        """The digest of the first `count` batches of a resource, or of all that it is, as `kept` finds them in a run that goes on."""
        if count is None:
            return contents_digest(self.resource(name))
        for _ in self.batches(name, limit=count - 1):  # one more is digested before the limit ends it
            pass
        return self.digests[name]

    def _note_read(self, name: str, count: int | None, found: str) -> None:
        """Note what was read of a resource of the user, so that a run that goes on can tell whether it is still that."""
        if self.work is not None and name not in self.lent:
            self.work.folder.note_read(name, count, found)

    def edited(self, site: str, what: str, tensors: Iterable[str] = ()) -> None:
        """Report a site that the pass changed, and how.

        The site is the name of a tensor, or the path of a module with all its tensors; `tensors` are other tensors of the
        program that changed with it. What is not reported must stay as it was, bit by bit.
        """
        self.edits.append(Edit(site, what, tuple(tensors)))

    def settle(self, item: Pass | Trial) -> None:
        """Let the history record this pass in place of the one that runs: the same with what was searched for as options, so
        that a replay does not search.

        Of a pass that becomes others, give the trial of these (`attempt`), whose program the pass returns: the history has their
        records, and none of the pass that chose them.
        """
        self.settled = item

    def attempt(self, passes: Sequence[ModelPass], after: Trial | None = None) -> Trial:
        """Run passes in the place of this one, on the program that it was given or on what another trial made, with all their checks.

        Nothing of it stays unless this pass settles for it. Raises what the passes raise, and what stops them.
        """
        assert self.tried is not None, (
            "only a pass of the model stage that a pass manager runs can try others"
        )
        return self.tried(passes, after)

    def note(self, line: str) -> None:
        """Tell the user what edits and declined sites do not say: the report of a compilation has a line of it."""
        if self.tell is not None:
            self.tell(line)

    @contextmanager
    def searching(self) -> Iterator[None]:
        """Within it, what is read of resources serves a choice that `settle` records: a replay does not read it, and the
        record does not name it."""
        before = dict(self.digests)
        try:
            yield
        finally:
            self.digests = before

    def rescaled(self, name: str, factors: torch.Tensor) -> None:
        """Report that an exact pass multiplied a parameter by factors that broadcast: its gradient is divided by them."""
        self.factors[name] = self.factors[name] * factors if name in self.factors else factors

    def reparametrized(self, name: str, gradient: GradientMap) -> None:
        """Report that an exact pass replaced a parameter by another function of the parameters, and how its gradient follows from the
        gradients of all before: `gradient` gives it, or None where they do not tell."""
        self.gradients[name] = gradient

    def declined(self, site: str, why: str) -> None:
        """Report a site that the pass left as it was, and why."""
        self.declines.append(Edit(site, why))

    def has(self, name: str) -> bool:
        """Whether a resource of that name was given."""
        return self.resources.get(name) is not None

    def resource(self, name: str) -> Any:
        """The resource of that name; its digest goes into the record. Raises ResourceError where it was not given."""
        if not self.has(name):
            argument = "calibration=batches" if name == CALIBRATION else f"resources={{{name!r}: ...}}"
            raise ResourceError(f"a pass needs the resource {name!r}, which was not given: pass {argument}")
        value = self.resources[name]
        if name != CALIBRATION:
            self.digests[name] = digest(value)
            if self.work is not None:
                self._note_read(name, None, contents_digest(value))
        return value

    def batches(
        self, name: str = CALIBRATION, limit: int | None = None
    ) -> Iterable[Mapping[str, torch.Tensor]]:
        """The batches of a resource, at most `limit`; the digest of those consumed goes into the record.

        Raises ResourceError for an iterator that can be read only once, for an empty resource, and for a batch that is no
        mapping.
        """
        source = self.resource(name)
        if isinstance(source, Mapping):
            source = [source]
        if not isinstance(source, Iterable) or iter(source) is source:
            raise ResourceError(f"resource {name!r} can be read only once: give a list of batches")
        consumed = DigestedBatches(source)
        for count, batch in enumerate(consumed):
            if limit is not None and count == limit:
                break
            if not isinstance(batch, Mapping):
                raise ResourceError(
                    f"batch {count} of {name!r} is a {type(batch).__name__}: give dicts of tensors by input name"
                )
            yield batch
        if consumed.count == 0:
            raise ResourceError(f"resource {name!r} holds no batch")
        self.digests[name] = consumed.digest
        self._note_read(name, consumed.count, consumed.digest)

    def calibrate(
        self,
        program: Program,
        names: set[str],
        visit: Callable[[str, torch.Tensor], None],
        limit: int | None = None,
    ) -> int:
        """Run the program on the calibration batches and call `visit(name, value)` for the nodes in `names`.

        Memory is bounded by one batch. Returns the number of batches; raises ResourceError where a batch does not fit the
        program, or where a value that is to be measured is not finite: nothing can be concluded from it.
        """
        observed = Observed(program)
        nodes = {node.name: node for node in program.graph.nodes}
        count = 0

        def visit_finite(name: str, value: torch.Tensor) -> None:
            check_finite(nodes[name], value, count, filled)
            visit(name, value)

        for batch in track(self.batches(limit=limit), "calibrating"):
            try:
                filled = fill_categorical(program.inputs, batch, start=count)
                observed.run(filled, names, visit_finite)
            except InputError as error:
                raise ResourceError(f"calibration batch {count} does not fit the program: {error}") from error
            count += 1
        return count

    def calibrate_layers(
        self,
        program: Program,
        rewrite: Callable[[LayerPart], None],
        limit: int | None = None,
        memory: int | None = None,
    ) -> int:
        """Call `rewrite(part)` for each part of the program in order: each repeated layer, and what is before, between and
        after them.

        A part is observed (`part.observe(names, visit)`) on what the parts before it give, as these were rewritten, over the
        calibration batches, at most `limit`; `rewrite` may then edit the program there. Each part runs once for each
        observation and once for what the next one reads, so time is linear in the number of layers. Layers that share
        weights are one part, and so is a program without repeated layers.

        In memory are the weights of one part, and what flows into it for all batches: at most `memory` bytes of that, by
        default a quarter of what is free; the rest is in temporary files (TMPDIR). Several ranks do the same, each by itself.

        Returns the number of batches. Raises ResourceError where a batch does not fit the program, or a value that is
        observed is not finite; PassError where `rewrite` changes what an earlier part has run with, or observes what is not
        in its part.
        """
        return calibrate_layers(program, self.batches(limit=limit), rewrite, memory)

    def cycle(self, name: str, count: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """`count` batches of a resource, starting over where it holds fewer; the recorded digest is that of the first
        time through."""
        taken, whole, first = 0, 0, ""
        while taken < count:
            for batch in self.batches(name, limit=count - taken):
                yield batch
                taken += 1
            whole, first = whole or taken, first or self.digests[name]
        self.digests[name] = first
        self._note_read(name, whole, first)

    def train(self, program: Program, batches: Iterable[Mapping[str, torch.Tensor]], steps: int) -> Trained:
        """Train all parameters that are not frozen on the output `loss`, one step a batch.

        The resource "trainer" says how, by a configuration such as `Torch(optimizer=AdamW(lr=1e-3))`; without it AdamW
        trains at its default rate. Raises ResourceError for a configuration that does not train.
        """
        assert self.trainer is not None, "only a pass that compile or a Pipeline runs can train"
        return self.trainer(self.resource(TRAINER) if self.has(TRAINER) else None, program, batches, steps)

    @overload
    def run(
        self, item: ModelPass, program: Program, resources: Mapping[str, object] | None = None
    ) -> Program: ...

    @overload
    def run(
        self, item: StepPass, program: StepProgram, resources: Mapping[str, object] | None = None
    ) -> StepProgram: ...

    def run(
        self,
        item: ModelPass | StepPass,
        program: Program | StepProgram,
        resources: Mapping[str, object] | None = None,
    ) -> Program | StepProgram:
        """Run another pass as a part of this one, with its own verification and record; `resources` are there for it beside
        those that were given."""
        assert self.nested is not None, "only a pass that a pass manager runs can run another"
        return self.nested(item, program, resources or {})
