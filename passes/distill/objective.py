"""The objective as a program: its only output is the loss against values of the teacher, which are inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bmgraph.deltas.soft_prompt import drop_prompt_positions
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, shape, value
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.passes.distill.likeliest import Likeliest, at_least_single, lumped_divergence
from bmgraph.passes.distill.teacher import Made
from bmgraph.verify.padding import padding_mask

aten = torch.ops.aten

PREFIX, CLASSES = "teacher_", "_classes"
"""Prefix of the inputs that take the teacher's values; the number of the pair follows. What follows that in the name of the input that
takes the classes which a pair's likeliest logits are of."""


SQUARES, COSINE, DIVERGENCE = "squares", "cosine", "divergence"
"""What is compared at each position: the mean squared error, one minus the cosine, KL(teacher, student) of logits."""
MAP_SQUARES, MAP_DIVERGENCE = "map squares", "map divergence"
"""What is compared of scores f[B, H, S, T] at each query, as a mean over heads: the mean squared error of their softmax over T
keys, KL(teacher, student) of it."""


@dataclass(frozen=True)
class Pair:
    """A value of the student and the value of the teacher that it is trained to match.

    `student` and `teacher` are their names, `node` is the student's value, or what adds it to a copy of its program, `width` the
    last size of the teacher's value; None where that is no axis of features: then every element is a position. `likeliest`: what of
    the teacher's logits is kept; then `teacher` is the name of its probabilities.
    """

    student: str
    node: fx.Node | Made
    teacher: str
    width: Any
    likeliest: Likeliest | None = None

    def targets(self, index: int, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs of the objective for the pair of this number, of the teacher's values by name."""
        found = {f"{PREFIX}{index}": values[self.teacher]}
        if self.likeliest is not None:
            found[f"{PREFIX}{index}{CLASSES}"] = values[self.likeliest.classes]
        return found


@dataclass(frozen=True)
class Objective:
    """Pairs that are compared in one way, and the weight of their mean in the loss."""

    pairs: list[Pair]
    compared: str
    weight: float = 1.0


def objective_program(
    program: Program,
    objectives: list[Objective],
    temperature: float,
    hard: float,
    seed: int,
    by: str,
    fed: Sequence[Pair] = (),
) -> Program:
    """The program with one output, `loss`, and the values of the teacher as additional inputs, numbered through all pairs.

    The loss is the sum of the objectives by their weights. Each is the mean over the positions of its pairs, except padding and
    the positions of a soft prompt; divergences are at `temperature`, times temperature squared. With `hard` above 0 it is
    (1 - hard) times that and `hard` times the program's own loss. Where widths differ, a trainable projection is added,
    initialized with `seed`. `by` is the text of the pass, recorded on new nodes. `fed`: values of the student that those of the
    teacher take the place of; their inputs are numbered after those of the pairs.
    """
    objective = program.clone()
    nodes = {node.name: node for node in objective.graph.nodes}
    output = output_node(objective.graph)
    returned: Any = output.args[0]
    generator = torch.Generator().manual_seed(seed)
    with objective.edit(by=by) as editor:
        means, first = [], 0
        for index, pair in enumerate(fed, start=sum(len(item.pairs) for item in objectives)):
            _feed(editor, nodes, pair, index)
        for item in objectives:
            terms = [
                _compared(editor, nodes, pair, item.compared, temperature, index, generator)
                for index, pair in enumerate(item.pairs, start=first)
            ]
            means.append((_mean(editor, terms), item.weight))
            first += len(item.pairs)
        loss = _weighted(editor, means)
        if hard:
            own = nodes[returned[[spec.name for spec in program.outputs].index(program.losses[0])].name]
            loss = _weighted(editor, [(loss, 1 - hard), (own, hard)])
        output.args = ((loss, *returned[len(program.outputs) :]),)
        objective.outputs = (TensorSpec("loss", value(loss).dtype, ()),)
        objective.losses = ("loss",)
    objective.trained_whole -= set(program.tensors()) - set(
        objective.tensors()
    )  # only what the loss reads is left
    return _drop_unused_inputs(objective)


def _compared(
    editor: Editor,
    nodes: dict[str, fx.Node],
    pair: Pair,
    compared: str,
    temperature: float,
    index: int,
    generator: torch.Generator,
) -> fx.Node:
    """The error of a pair at each position; the teacher's value is a new input with its number."""
    found = nodes[pair.node.name] if isinstance(pair.node, fx.Node) else pair.node(editor, nodes)
    student = drop_prompt_positions(editor, found)
    if pair.likeliest is not None:
        places, count = shape(student)[:-1], pair.likeliest.count
        dtype = at_least_single(value(student).dtype)
        target = editor.input(f"{PREFIX}{index}", torch.zeros((), dtype=dtype), (*places, count + 1))
        classes = editor.input(
            f"{PREFIX}{index}{CLASSES}", torch.zeros((), dtype=torch.int32), (*places, count)
        )
        program, last = (
            editor.program,
            shape(student)[-1] - 1,
        )  # a class that is not there is refused, not gathered
        program.inputs = (*program.inputs[:-1], replace(program.inputs[-1], values=(0, int(last))))
        return lumped_divergence(editor, student, classes, target, temperature)
    sizes = shape(student) if pair.width is None else (*shape(student)[:-1], pair.width)
    target = editor.input(f"{PREFIX}{index}", torch.zeros((), dtype=value(student).dtype), sizes)
    if pair.width is not None and pair.width != shape(student)[-1]:
        student = _project(editor, student, pair.width, index, generator)
    if compared == DIVERGENCE:
        return _kl_divergence(editor, student, target, temperature)
    if compared == COSINE:
        return _angle(editor, student, target)
    if compared in (MAP_SQUARES, MAP_DIVERGENCE):
        return _map_error(editor, student, target, compared)
    return _squared_error(editor, student, target, features=pair.width is not None)


def _feed(editor: Editor, nodes: dict[str, fx.Node], pair: Pair, index: int) -> None:
    """Let what reads a value of the student read the teacher's, a new input with the pair's number."""
    assert isinstance(pair.node, fx.Node)
    own = nodes[pair.node.name]
    given = editor.input(f"{PREFIX}{index}", torch.zeros((), dtype=value(own).dtype), shape(own))
    own.replace_all_uses_with(given)


def _weighted(editor: Editor, items: list[tuple[fx.Node, float]]) -> fx.Node:
    """The sum of scalars times their weights."""
    like = output_node(editor.graph)
    found = [
        item if weight == 1.0 else editor.call(aten.mul.Tensor, item, weight, like=like)
        for item, weight in items
    ]
    total = found[0]
    for item in found[1:]:
        total = editor.call(aten.add.Tensor, total, item, like=like)
    return total


def _project(editor: Editor, student: fx.Node, width: int, index: int, generator: torch.Generator) -> fx.Node:
    """The student's value [..., d] projected to the teacher's width by a trainable matrix [width, d]."""
    size = shape(student)[-1]
    matrix = torch.randn(width, size, generator=generator, dtype=value(student).dtype) / size**0.5
    reader = editor.parameter(
        editor.fresh(f"teacher_projection_{index}"),
        matrix.to(editor.program.device),
        part=NodeRole.PROJECTION,
    )
    return editor.call(aten.linear.default, student, reader, like=output_node(editor.graph))


def _kl_divergence(editor: Editor, student: fx.Node, teacher: fx.Node, temperature: float) -> fx.Node:
    """KL(teacher, student) at each position, times temperature squared; both f[..., V] are logits."""
    like = output_node(editor.graph)
    mine, theirs = (
        editor.call(
            aten.log_softmax.int, editor.call(aten.div.Tensor, logits, temperature, like=like), -1, like=like
        )
        for logits in (student, teacher)
    )
    difference = editor.call(aten.sub.Tensor, theirs, mine, like=like)
    weighted = editor.call(
        aten.mul.Tensor, editor.call(aten.exp.default, theirs, like=like), difference, like=like
    )
    divergence = editor.call(aten.sum.dim_IntList, weighted, [-1], like=like)
    return editor.call(aten.mul.Tensor, divergence, temperature**2, like=like)


def _squared_error(editor: Editor, student: fx.Node, teacher: fx.Node, features: bool) -> fx.Node:
    """The mean squared error at each position; both are f[..., d] with `features`, else f[...]."""
    like = output_node(editor.graph)
    difference = editor.call(aten.sub.Tensor, student, teacher, like=like)
    squared = editor.call(aten.mul.Tensor, difference, difference, like=like)
    return editor.call(aten.mean.dim, squared, [-1], like=like) if features else squared


def _map_error(editor: Editor, student: fx.Node, teacher: fx.Node, compared: str) -> fx.Node:
    """The error of the softmax of scores f[B, H, S, T] at each query f[B, S], as a mean over heads."""
    like = output_node(editor.graph)
    if compared == MAP_DIVERGENCE:
        each = _kl_divergence(editor, student, teacher, 1.0)
    else:
        mine, other = (editor.call(aten.softmax.int, scores, -1, like=like) for scores in (student, teacher))
        each = _squared_error(editor, mine, other, features=True)
    return editor.call(aten.mean.dim, each, [1], like=like)


def _angle(editor: Editor, student: fx.Node, teacher: fx.Node) -> fx.Node:
    """One minus the cosine at each position; both are f[..., d]."""
    like = output_node(editor.graph)
    cosine = editor.call(aten.cosine_similarity.default, student, teacher, -1, like=like)
    return editor.call(aten.rsub.Scalar, cosine, 1.0, like=like)


def _mean(editor: Editor, terms: list[fx.Node]) -> fx.Node:
    """The mean over the positions of all terms, without padding, as one sum over one count, so that ranks can add both."""
    like = output_node(editor.graph)
    sums, counts = [], []
    for term in terms:
        kept = _position_weights(editor, term)
        sums.append(
            editor.call(aten.sum.default, editor.call(aten.mul.Tensor, term, kept, like=like), like=like)
        )
        counts.append(editor.call(aten.sum.default, kept, like=like))
    total, count = (
        editor.call(aten.sum.default, editor.call(aten.stack.default, items, like=like), like=like)
        for items in (sums, counts)
    )
    return editor.call(aten.div.Tensor, total, count, like=like)


def _position_weights(editor: Editor, term: fx.Node) -> fx.Node:
    """1 where a position counts, 0 for padding: the mask input where its shape is that of the term, else all ones."""
    program, like = editor.program, output_node(editor.graph)
    mask, inputs = padding_mask(program, program.example), placeholders(editor.graph)
    if mask is not None and dims(program, value(inputs[mask])) == dims(program, value(term)):
        return editor.call(aten.to.dtype, inputs[mask], value(term).dtype, like=like)
    return editor.call(aten.ones_like.default, term, like=like)


def _drop_unused_inputs(objective: Program) -> Program:
    """Remove the inputs that the loss does not read (labels), and the example."""
    for node in placeholders(objective.graph).values():
        if not node.users:
            objective.graph.erase_node(node)
    used = set(placeholders(objective.graph))
    objective.inputs = tuple(spec for spec in objective.inputs if spec.name in used)
    objective.example = {}
    return objective
