"""Distill: train a program to give what a teacher gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from bmgraph.capturing import capture
from bmgraph.context import Context
from bmgraph.deltas import backbone_of
from bmgraph.digest import fingerprint
from bmgraph.editor import Editor
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.metadata import dims, shape, value
from bmgraph.observe import Observed
from bmgraph.pass_base import Effect, Pass
from bmgraph.program import Program, output_node, placeholders
from bmgraph.reference import Batch, padding_mask
from bmgraph.signature import TensorSpec
from bmgraph.structure.hidden import hidden_states
from bmgraph.to_export import deployed

aten = torch.ops.aten

LOGITS, OUTPUTS, HIDDEN = "logits", "outputs", "hidden"
WHAT = (LOGITS, OUTPUTS, HIDDEN)

PREFIX = "teacher_"
"""Begins the names of the lesson's inputs that the teacher gives."""


@dataclass(frozen=True, repr=False)
class Distill(Pass):
    """Train all that is not frozen, for `steps` steps, to give what `teacher` gives on the batches of `data`.

    teacher: the name of a resource, a program, a model or an engine, of any architecture that reads the same inputs.
    data: the name of a resource, batches without labels, read from their beginning again where they are fewer than
    steps. on: "logits" for the divergence KL(teacher, student) of the outputs called logits at `temperature` (times its
    square); "outputs" for the mean squared error of all float outputs that both have; "hidden" for that of the hidden
    states behind layers. layers: pairs (student's layer, teacher's layer) counted from 0; by default each of the
    student's is paired with the teacher's at the same share of the depth, the last with the last. Where widths differ
    a projection of the student's is trained beside it, and left behind. Padding does not count.

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
        teacher = _Teacher.of(context.resource(self.teacher), first)
        pairs = self._pairs(program, teacher)
        lesson = self._lesson(program, pairs)

        def answered() -> Iterator[Batch]:
            for batch in context.cycle(self.data, self.steps):
                answers = teacher.answers(batch, {pair.teacher for pair in pairs})
                given = {PREFIX + str(index): answers[pair.teacher] for index, pair in enumerate(pairs)}
                yield _only({**batch, **given}, lesson.inputs, "the program")

        done = context.train(lesson, answered(), self.steps)
        for mine, trained in (
            (program.parameters, done.program.parameters),
            (program.buffers, done.program.buffers),
        ):
            mine.update({name: tensor for name, tensor in trained.items() if name in mine})
        program.fingerprint = fingerprint(backbone_of(program))
        for pair in pairs:
            context.edited(
                pair.student,
                f"learnt the teacher's {pair.teacher} in {self.steps} steps, loss "
                f"{done.losses[0]:.4g} -> {done.losses[-1]:.4g}",
            )
        return program

    def _pairs(self, program: Program, teacher: _Teacher) -> list[_Pair]:
        if self.on == HIDDEN:
            return _hidden_pairs(program, teacher, self.layers)
        returned: Any = output_node(program.graph).args[0]
        known = {spec.name: spec for spec in teacher.outputs}
        pairs = []
        for spec, node in zip(program.outputs, returned):
            fits = spec.dtype.is_floating_point and spec.name not in program.losses and spec.name in known
            if fits and (self.on == OUTPUTS or spec.name.split(".")[-1] == LOGITS):
                pairs.append(_Pair(spec.name, node, spec.name, known[spec.name].shape[-1]))
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

    def _lesson(self, program: Program, pairs: list[_Pair]) -> Program:
        """The program with one output, `loss`, and what the teacher gives as further inputs."""
        lesson = program.clone()
        nodes = {node.name: node for node in lesson.graph.nodes}
        output = output_node(lesson.graph)
        returned: Any = output.args[0]
        generator = torch.Generator().manual_seed(self.seed)
        with lesson.edit(by=str(self)) as editor:
            terms = []
            for index, pair in enumerate(pairs):
                student = nodes[pair.node.name]
                sizes = (*shape(student)[:-1], pair.width)
                answer = editor.input(PREFIX + str(index), torch.zeros((), dtype=value(student).dtype), sizes)
                if pair.width != shape(student)[-1]:
                    student = _projected(editor, student, pair.width, index, generator)
                if self.on == LOGITS:
                    terms.append(_divergence(editor, student, answer, self.temperature))
                else:
                    terms.append(_squares(editor, student, answer))
            loss = _mean(editor, terms)
            output.args = ((loss, *returned[len(program.outputs) :]),)
            lesson.outputs = (TensorSpec("loss", value(loss).dtype, ()),)
            lesson.losses = ("loss",)
        return _without_idle_inputs(lesson)


@dataclass(frozen=True)
class _Pair:
    """A value of the program and what it is to become: `student` and `teacher` name them for people, `width` is the last
    size of the teacher's."""

    student: str
    node: fx.Node
    teacher: str
    width: Any


@dataclass(frozen=True)
class _Teacher:
    """Whatever teaches: its outputs, what it gives for a batch, and its program where it has one."""

    outputs: tuple[TensorSpec, ...]
    answers: Callable[[Batch, set[str]], dict[str, torch.Tensor]]
    program: Program | None = None

    @staticmethod
    def of(teacher: Any, batch: Batch) -> _Teacher:
        """A program, a model (captured with the batch), or anything with inputs and outputs that can be called."""
        if isinstance(teacher, nn.Module):
            takes = inspect.signature(teacher.forward).parameters
            teacher = capture(teacher, {name: item for name, item in batch.items() if name in takes})
        if isinstance(teacher, Program):
            served = deployed(teacher)
            observed = Observed(served)

            def answers(batch: Batch, names: set[str]) -> dict[str, torch.Tensor]:
                seen: dict[str, torch.Tensor] = {}
                outputs = observed.run(_only(batch, served.inputs, "the teacher"), names, seen.__setitem__)
                return {**outputs, **seen}

            return _Teacher(served.outputs, answers, served)
        if not (callable(teacher) and hasattr(teacher, "inputs") and hasattr(teacher, "outputs")):
            raise ResourceError(
                f"the teacher is a {type(teacher).__name__}: give a program, a model or an engine"
            )
        return _Teacher(
            teacher.outputs, lambda batch, names: teacher(**_only(batch, teacher.inputs, "the teacher"))
        )


def _only(batch: Batch, inputs: tuple[TensorSpec, ...], whose: str) -> dict[str, torch.Tensor]:
    """The inputs named of a batch; raises ResourceError for one that it lacks."""
    for spec in inputs:
        if spec.name not in batch:
            raise ResourceError(
                f"a batch to distil on lacks input {spec.name!r} of {whose}: it has {', '.join(batch)}"
            )
    return {spec.name: batch[spec.name] for spec in inputs}


def _hidden_pairs(program: Program, teacher: _Teacher, layers: tuple[tuple[int, int], ...]) -> list[_Pair]:
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
            pairs.append(_Pair(f"layer {first}", student, wanted.name, shape(wanted)[-1]))
    return pairs


def _by_depth(count: int, other: int) -> list[tuple[int, int]]:
    """Each of `count` layers with the one at the same share of the depth of `other`, the last with the last."""
    return [(layer, max(0, round((layer + 1) * other / count) - 1)) for layer in range(count)]


def _projected(
    editor: Editor, student: fx.Node, width: int, index: int, generator: torch.Generator
) -> fx.Node:
    """The student's value [..., d] at the teacher's width, by a matrix that is trained with it."""
    size = shape(student)[-1]
    matrix = torch.randn(width, size, generator=generator, dtype=value(student).dtype) / size**0.5
    reader = editor.parameter(
        editor.fresh(f"teacher_projection_{index}"), matrix.to(editor.program.device), part="projection"
    )
    return editor.call(aten.linear.default, student, reader, like=output_node(editor.graph))


def _divergence(editor: Editor, student: fx.Node, teacher: fx.Node, temperature: float) -> fx.Node:
    """KL(teacher, student) at each position, times temperature squared; both f[..., V] are logits."""
    like = output_node(editor.graph)
    mine, theirs = (
        editor.call(
            aten.log_softmax.int, editor.call(aten.div.Tensor, logits, temperature, like=like), -1, like=like
        )
        for logits in (student, teacher)
    )
    apart = editor.call(aten.sub.Tensor, theirs, mine, like=like)
    weighted = editor.call(
        aten.mul.Tensor, editor.call(aten.exp.default, theirs, like=like), apart, like=like
    )
    each = editor.call(aten.sum.dim_IntList, weighted, [-1], like=like)
    return editor.call(aten.mul.Tensor, each, temperature**2, like=like)


def _squares(editor: Editor, student: fx.Node, teacher: fx.Node) -> fx.Node:
    """The mean squared error at each position; both are f[..., d]."""
    like = output_node(editor.graph)
    apart = editor.call(aten.sub.Tensor, student, teacher, like=like)
    squared = editor.call(aten.mul.Tensor, apart, apart, like=like)
    return editor.call(aten.mean.dim, squared, [-1], like=like)


def _mean(editor: Editor, terms: list[fx.Node]) -> fx.Node:
    """The mean over all positions of all terms, without padding: one sum over one count, which ranks can share."""
    like = output_node(editor.graph)
    sums, counts = [], []
    for term in terms:
        kept = _kept(editor, term)
        sums.append(
            editor.call(aten.sum.default, editor.call(aten.mul.Tensor, term, kept, like=like), like=like)
        )
        counts.append(editor.call(aten.sum.default, kept, like=like))
    total, count = (
        editor.call(aten.sum.default, editor.call(aten.stack.default, items, like=like), like=like)
        for items in (sums, counts)
    )
    return editor.call(aten.div.Tensor, total, count, like=like)


def _kept(editor: Editor, term: fx.Node) -> fx.Node:
    """1 where a position counts, 0 where it is padding: the mask among the inputs where it is of the term's sizes."""
    program, like = editor.program, output_node(editor.graph)
    found = padding_mask(program.example)
    inputs = placeholders(editor.graph)
    for name, tensor in program.example.items():
        if tensor is found and dims(program, value(inputs[name])) == dims(program, value(term)):
            return editor.call(aten.to.dtype, inputs[name], value(term).dtype, like=like)
    return editor.call(aten.ones_like.default, term, like=like)


def _without_idle_inputs(lesson: Program) -> Program:
    """The lesson without the inputs that its loss does not read (labels), and without an example."""
    for node in placeholders(lesson.graph).values():
        if not node.users:
            lesson.graph.erase_node(node)
    used = set(placeholders(lesson.graph))
    lesson.inputs = tuple(spec for spec in lesson.inputs if spec.name in used)
    lesson.example = {}
    return lesson
