"""A lesson: a program whose one output is how far it is from what a teacher gives, which is a further input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.deltas.soft_prompt import drop_prompt_positions
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, shape, value
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.verify.reference_outputs import padding_mask

aten = torch.ops.aten

PREFIX = "teacher_"
"""Begins the names of the inputs that the teacher gives; the number of the pair follows."""


@dataclass(frozen=True)
class Pair:
    """A value of the program and what it is to become: `student` and `teacher` name them, `width` is the last size of the
    teacher's."""

    student: str
    node: fx.Node
    teacher: str
    width: Any


def lesson_of(program: Program, pairs: list[Pair], temperature: float | None, seed: int, by: str) -> Program:
    """The program with one output, `loss`, and what the teacher gives as further inputs.

    The loss is the mean over all positions of all pairs, without padding and without those that a prompt inserted: the
    divergence of logits where there is a `temperature`, else the mean squared error. Where widths differ a projection is
    trained too, drawn with `seed`.
    """
    lesson = program.clone()
    nodes = {node.name: node for node in lesson.graph.nodes}
    output = output_node(lesson.graph)
    returned: Any = output.args[0]
    generator = torch.Generator().manual_seed(seed)
    with lesson.edit(by=by) as editor:
        terms = []
        for index, pair in enumerate(pairs):
            student = drop_prompt_positions(editor, nodes[pair.node.name])
            sizes = (*shape(student)[:-1], pair.width)
            answer = editor.input(f"{PREFIX}{index}", torch.zeros((), dtype=value(student).dtype), sizes)
            if pair.width != shape(student)[-1]:
                student = _projected(editor, student, pair.width, index, generator)
            if temperature is None:
                terms.append(_squares(editor, student, answer))
            else:
                terms.append(_divergence(editor, student, answer, temperature))
        loss = _mean(editor, terms)
        output.args = ((loss, *returned[len(program.outputs) :]),)
        lesson.outputs = (TensorSpec("loss", value(loss).dtype, ()),)
        lesson.losses = ("loss",)
    return _without_idle_inputs(lesson)


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
