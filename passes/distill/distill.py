"""Distill: train a program to give what a teacher gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.deltas.low_rank import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import shape
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass
from bmgraph.passes.distill.objective import PREFIX, Pair, lesson_of
from bmgraph.passes.distill.teacher import Teacher, only
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.reference_outputs import Batch

LOGITS, OUTPUTS, HIDDEN = "logits", "outputs", "hidden"
WHAT = (LOGITS, OUTPUTS, HIDDEN)


@dataclass(frozen=True, repr=False)
class Distill(Pass):
    """Train all that is not frozen, for `steps` steps, to give what `teacher` gives on the batches of `data`.

    teacher: the name of a resource, a program, a model or an engine, of any architecture that reads the same inputs.
    data: the name of a resource, batches without labels, read from their beginning again where they are fewer than
    steps. on: "logits" for the divergence KL(teacher, student) of the outputs called logits at `temperature` (times its
    square); "outputs" for the mean squared error of all float outputs that both have; "hidden" for that of the hidden
    states behind layers. layers: pairs (student's layer, teacher's layer) counted from 0; by default each of the
    student's is paired with the teacher's at the same share of the depth, the last with the last. Where widths differ
    a projection of the student's is trained beside it, and left behind. Padding and inserted prompts do not count; rows
    that choose deltas by name take all of them in turn.

    The trainer is the resource "trainer", `Torch(optimizer=AdamW(lr=...), passes=(ZeRO(3),))`, else a default. Every
    rank runs the teacher on the whole batch. Raises PassError where the two do not fit.

    Sources: Hinton et al. 2015 (arXiv:1503.02531); for hidden states Jiao et al. 2020 (arXiv:1909.10351).
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"distilled"})

    teacher: str = "teacher"
    data: str = "text"
    steps: int = 200
    on: str = LOGITS
    temperature: float = 1.0
    layers: tuple[tuple[int, int], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on not in WHAT:
            raise InputError(f"on={self.on!r}: choose one of {', '.join(WHAT)}")
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: give at least 1")
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}: give a number above 0")
        if self.layers and self.on != HIDDEN:
            raise InputError(f"layers= pairs hidden states: give on={HIDDEN!r} with it")

    @property
    def resources(self) -> tuple[str, ...]:
        return (self.teacher, self.data)

    def run(self, program: Program, context: Context) -> Program:
        first = next(iter(context.batches(self.data, 1)))
        teacher = Teacher.of(context.resource(self.teacher), first)
        pairs = self._pairs(program, teacher)
        lesson = lesson_of(
            program, pairs, self.temperature if self.on == LOGITS else None, self.seed, str(self)
        )

        def answered() -> Iterator[Batch]:
            for step, batch in enumerate(context.cycle(self.data, self.steps)):
                answers = teacher.answers(batch, {pair.teacher for pair in pairs})
                given = {f"{PREFIX}{index}": answers[pair.teacher] for index, pair in enumerate(pairs)}
                named = fill_categorical(program.inputs, batch, start=step)
                yield only({**batch, **named, **given}, lesson.inputs, "the program")

        done = context.train(lesson, answered(), self.steps)
        for mine, trained in (
            (program.parameters, done.program.parameters),
            (program.buffers, done.program.buffers),
        ):
            mine.update({name: tensor for name, tensor in trained.items() if name in mine})
        if set(backbone_of(program)) & set(done.program.parameters) - program.frozen:
            program.fingerprint = fingerprint(backbone_of(program))
        for pair in pairs:
            context.edited(
                pair.student,
                f"learnt the teacher's {pair.teacher} in {self.steps} steps, loss "
                f"{done.losses[0]:.4g} -> {done.losses[-1]:.4g}",
            )
        return program

    def _pairs(self, program: Program, teacher: Teacher) -> list[Pair]:
        if self.on == HIDDEN:
            return _hidden_pairs(program, teacher, self.layers)
        returned: Any = output_node(program.graph).args[0]
        known = {spec.name: spec for spec in teacher.outputs}
        pairs = []
        for spec, node in zip(program.outputs, returned):
            fits = spec.dtype.is_floating_point and spec.name not in program.losses and spec.name in known
            if fits and (self.on == OUTPUTS or spec.name.split(".")[-1] == LOGITS):
                pairs.append(Pair(spec.name, node, spec.name, known[spec.name].shape[-1]))
        if not pairs:
            mine, theirs = (
                ", ".join(spec.name for spec in found) for found in (program.outputs, known.values())
            )
            raise PassError(
                f"nothing to distil on {self.on}: the program gives {mine}, the teacher {theirs}; "
                f"choose another on= of {', '.join(WHAT)}"
            )
        for pair in pairs:
            if self.on == LOGITS and pair.width != shape(pair.node)[-1]:
                raise PassError(
                    f"the teacher's {pair.teacher} are over {pair.width} classes, the program's over "
                    f"{shape(pair.node)[-1]}: distil with on={HIDDEN!r}"
                )
        return pairs


def _hidden_pairs(program: Program, teacher: Teacher, layers: tuple[tuple[int, int], ...]) -> list[Pair]:
    """The hidden states behind the layers of both, stack by stack, paired by number or by depth."""
    if teacher.program is None:
        raise PassError(
            "an engine shows no hidden states: give the teacher's program, or distil on its outputs"
        )
    mine, theirs = hidden_states(program), hidden_states(teacher.program)
    if len(mine) != len(theirs) or not mine:
        raise PassError(
            f"the program has {len(mine)} stacks of layers, the teacher {len(theirs)}: distil on {OUTPUTS!r}"
        )
    pairs = []
    for own, other in zip(mine, theirs):
        for first, second in layers or _by_depth(len(own), len(other)):
            if not (0 <= first < len(own) and 0 <= second < len(other)):
                raise PassError(
                    f"layers=({first}, {second}): the program's layers are 0 to {len(own) - 1}, "
                    f"the teacher's 0 to {len(other) - 1}"
                )
            student, wanted = own[first], other[second]
            if student is None or wanted is None:
                whose = "program" if student is None else "teacher"
                number = first if student is None else second
                raise PassError(
                    f"layer {number} of the {whose} has no hidden state of its own: pair others by layers="
                )
            pairs.append(Pair(f"layer {first}", student, wanted.name, shape(wanted)[-1]))
    return pairs


def _by_depth(count: int, other: int) -> list[tuple[int, int]]:
    """Each of `count` layers with the one at the same share of the depth of `other`, the last with the last."""
    return [(layer, max(0, round((layer + 1) * other / count) - 1)) for layer in range(count)]
