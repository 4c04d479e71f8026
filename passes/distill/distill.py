"""Distill: the pass that trains a student on a teacher's outputs or hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import shape
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.distill.objective import (
    COSINE,
    DIVERGENCE,
    PREFIX,
    SQUARES,
    Objective,
    Pair,
    objective_program,
)
from bmgraph.passes.distill.teacher import Teacher, select_inputs
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.kept_calls import check_kept_calls
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch

LOGITS, OUTPUTS, HIDDEN, EMBEDDINGS = "logits", "outputs", "hidden", "cosine"
OBJECTIVES = {LOGITS: DIVERGENCE, OUTPUTS: SQUARES, HIDDEN: SQUARES, EMBEDDINGS: COSINE}
"""What the student is trained on -> what is compared at each position."""


@dataclass(frozen=True, repr=False)
class Distill(ModelPass):
    """Train all parameters that are not frozen, for `steps` steps, to match `teacher` on the batches of `data`.

    teacher: name of a resource: a program, a model or an engine, of any architecture that reads the same inputs.
    data: name of a resource: batches, repeated where there are fewer than `steps`. on: "logits" for
    the divergence KL(teacher, student) of the outputs named logits at `temperature`, times temperature squared;
    "outputs" for the mean squared error of all float outputs that both have, "cosine" for one minus their cosine; "hidden" for
    the mean squared error of the hidden states after the layers; or several of these, added by `weights` (by default 1 each).
    hard: the share of the program's own loss, which reads labels from the batches; the rest is the teacher's. layers: pairs (student layer, teacher layer) counted from 0; by default each student
    layer is paired with the teacher layer at the same relative depth, the last with the last. Where hidden sizes differ,
    a projection of the student's value is trained with it and then discarded. Padding and soft prompts do not count.
    Where the rows of a batch select deltas, they cycle through all of them.

    The resource "trainer" sets the optimizer and the step passes, `Torch(optimizer=AdamW(lr=...), passes=(ZeRO(3),))`; it
    is optional. Every rank runs the teacher on the whole batch. Raises PassError where outputs or layers of the two do
    not match, ResourceError where the teacher or a batch cannot be used.

    Sources: Hinton et al. 2015 (arXiv:1503.02531); for hidden states Jiao et al. 2020 (arXiv:1909.10351).
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"tensors"})
    provides: ClassVar[frozenset[str]] = frozenset({"distilled"})
    trains: ClassVar[bool] = True

    teacher: str = "teacher"
    data: str = "text"
    steps: int = 200
    on: str | tuple[str, ...] = LOGITS
    temperature: float = 1.0
    layers: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    hard: float = 0.0
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._on or not set(self._on) <= set(OBJECTIVES) or len(set(self._on)) < len(self._on):
            raise InputError(f"on={self.on!r}: choose one of {', '.join(OBJECTIVES)}, or several, each once")
        if self.weights and (
            len(self.weights) != len(self._on) or not all(0 < item < 1e6 for item in self.weights)
        ):
            raise InputError(f"weights={self.weights}: give one positive number for each of on={self.on!r}")
        if not 0 <= self.hard < 1:
            raise InputError(f"hard={self.hard}: give the share of the program's own loss, from 0 to below 1")
        if self.steps < 1:
            raise InputError(f"steps={self.steps}: give at least 1")
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature}: give a number above 0")
        if self.layers and HIDDEN not in self._on:
            raise InputError(f"layers= pairs hidden states: give on={HIDDEN!r} with it")

    @property
    def _on(self) -> tuple[str, ...]:
        return (self.on,) if isinstance(self.on, str) else self.on

    @property
    def resources(self) -> tuple[str, ...]:
        """The teacher and the training data."""
        return (self.teacher, self.data)

    def run(self, program: Program, context: Context) -> Program:
        """Train on the distillation objective and take over the trained tensors."""
        first = next(iter(context.batches(self.data, 1)))
        teacher = Teacher.of(context.resource(self.teacher), first)
        if self.hard and not program.losses:
            raise PassError(
                f"hard={self.hard} is the share of the program's own loss, and it has none: capture the model with labels, or leave "
                "hard out"
            )
        objectives = [
            Objective(self._pairs(program, teacher, on), OBJECTIVES[on], weight)
            for on, weight in zip(self._on, self.weights or (1.0,) * len(self._on))
        ]
        pairs = [pair for item in objectives for pair in item.pairs]
        objective = objective_program(program, objectives, self.temperature, self.hard, self.seed, str(self))

        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(context.cycle(self.data, self.steps)):
                values = teacher.values(batch, {pair.teacher for pair in pairs})
                targets = {f"{PREFIX}{index}": values[pair.teacher] for index, pair in enumerate(pairs)}
                named = fill_categorical(program.inputs, batch, start=step)
                yield select_inputs({**batch, **named, **targets}, objective.inputs, "the program")

        done = context.train(objective, batches(), self.steps)
        for tensors, trained in (
            (program.parameters, done.program.parameters),
            (program.buffers, done.program.buffers),
        ):
            tensors.update({name: tensor for name, tensor in trained.items() if name in tensors})
        if set(backbone_of(program)) & set(done.program.parameters) - program.frozen:
            program.fingerprint = fingerprint(backbone_of(program))
        for pair in pairs:
            context.edited(
                pair.student,
                f"trained on the teacher's {pair.teacher} for {self.steps} steps, loss "
                f"{done.losses[0]:.4g} -> {done.losses[-1]:.4g}",
            )
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Training changes tensors, and no call."""
        check_kept_calls(before, after, str(self))

    def _pairs(self, program: Program, teacher: Teacher, on: str) -> list[Pair]:
        """The values of the student and the teacher that an objective compares."""
        if on == HIDDEN:
            return _hidden_pairs(program, teacher, self.layers)
        returned: Any = output_node(program.graph).args[0]
        known = {spec.name: spec for spec in teacher.outputs}
        pairs = []
        for spec, node in zip(program.outputs, returned):
            comparable = (
                spec.dtype.is_floating_point and spec.name not in program.losses and spec.name in known
            )
            if comparable and (on != LOGITS or (spec.shape and spec.name.split(".")[-1] == LOGITS)):
                width = _width(spec, known[spec.name])
                if on != EMBEDDINGS or width is not None:
                    pairs.append(Pair(spec.name, node, spec.name, width))
        if not pairs:
            mine, theirs = (
                ", ".join(spec.name for spec in found) for found in (program.outputs, known.values())
            )
            raise PassError(
                f"nothing to distill on {on}: the outputs of the program are {mine}, of the teacher {theirs}; "
                f"choose another on= of {', '.join(OBJECTIVES)}"
            )
        for pair in pairs:
            if on == LOGITS and pair.width not in (None, shape(pair.node)[-1]):
                raise PassError(
                    f"the teacher's {pair.teacher} are over {pair.width} classes, the program's over "
                    f"{shape(pair.node)[-1]}: distill with on={HIDDEN!r}"
                )
        return pairs


def _width(mine: TensorSpec, theirs: TensorSpec) -> int | None:
    """The teacher's number of features; None for outputs without an axis of features: numbers, or one for each position.

    Raises PassError for outputs of different rank, or where only one of the two has features.
    """
    if len(mine.shape) != len(theirs.shape):
        raise PassError(f"the teacher's output is {theirs}, the program's {mine}: they cannot be compared")
    if not mine.shape:
        return None
    ours, width = mine.shape[-1], theirs.shape[-1]
    if isinstance(ours, int) != isinstance(width, int):
        raise PassError(f"the teacher's output is {theirs}, the program's {mine}: they cannot be compared")
    return width if isinstance(width, int) else None


def _hidden_pairs(program: Program, teacher: Teacher, layers: tuple[tuple[int, int], ...]) -> list[Pair]:
    """Pairs of hidden states after layers, stack by stack, by the given layer numbers or by relative depth."""
    if teacher.program is None:
        raise PassError(
            "an engine does not expose hidden states: give the teacher as a program, or distill on its outputs"
        )
    students, teachers = hidden_states(program), hidden_states(teacher.program)
    if len(students) != len(teachers) or not students:
        raise PassError(
            f"the program has {len(students)} stacks of layers, the teacher {len(teachers)}: distill with on={OUTPUTS!r}"
        )
    pairs = []
    for ours, theirs in zip(students, teachers):
        for first, second in layers or _by_depth(len(ours), len(theirs)):
            if not (0 <= first < len(ours) and 0 <= second < len(theirs)):
                raise PassError(
                    f"layers=({first}, {second}): the program's layers are 0 to {len(ours) - 1}, "
                    f"the teacher's 0 to {len(theirs) - 1}"
                )
            student, target = ours[first], theirs[second]
            if student is None or target is None:
                whose = "program" if student is None else "teacher"
                number = first if student is None else second
                raise PassError(
                    f"layer {number} of the {whose} has no separate hidden state: pair other layers with layers="
                )
            pairs.append(Pair(f"layer {first}", student, target.name, shape(target)[-1]))
    return pairs


def _by_depth(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each layer of the student with the teacher's layer at the same relative depth, the last with the last."""
    return [
        (layer, max(0, round((layer + 1) * teacher_layers / student_layers) - 1))
        for layer in range(student_layers)
    ]
