"""Which values of the student and of the teacher belong together: states of layers, attentions, what layers read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import fx

from bmgraph.analysis.structure.layer_blocks import Block, layer_blocks
from bmgraph.analysis.structure.residual_stream import hidden_states
from bmgraph.analysis.structure.value_origins import Core
from bmgraph.errors import MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import shape
from bmgraph.passes.distill.attention_maps import (
    KEYS,
    QUERIES,
    VALUES,
    attention_scores,
    has_heads,
    head_count,
    in_copy,
    is_self_attention,
    layer_attentions,
    relation_scores,
    relation_size,
)
from bmgraph.passes.distill.objective import Pair
from bmgraph.passes.distill.teacher import Made, Teacher

Ours = TypeVar("Ours")
Theirs = TypeVar("Theirs")

LayerMap = tuple[tuple[int, int], ...]
"""Pairs (student layer, teacher layer), counted from 0 in each stack; empty for the same relative depth."""


def hidden_pairs(program: Program, teacher: Program, layers: LayerMap) -> list[Pair]:
    """The hidden states after layers."""
    students, teachers = _stacks(program, hidden_states(program), teacher, hidden_states(teacher))
    pairs = []
    for ours, theirs in zip(students, teachers):
        for first, second in _mapped(layers, len(ours), len(theirs)):
            student, target = ours[first], theirs[second]
            if student is None or target is None:
                whose = "program" if student is None else "teacher"
                number = first if student is None else second
                raise PassError(
                    f"layer {number} of the {whose} has no separate hidden state: pair other layers with layers="
                )
            pairs.append(Pair(f"layer {first}", student, target.name, shape(target)[-1]))
    return pairs


def embedding_pairs(program: Program, teacher: Program) -> list[Pair]:
    """What enters the first layer of each stack: the sum of embeddings, as the first layer reads it."""
    students, teachers = _stacks(program, _blocks(program), teacher, _blocks(teacher))
    pairs = []
    for ours, theirs in zip(students, teachers):
        first, second = _separate(ours, 0, "program").enters, _separate(theirs, 0, "teacher").enters
        pairs.append(Pair("embeddings", first, second.name, shape(second)[-1]))
    return pairs


def layer_wise_pairs(program: Program, teacher: Program, layers: LayerMap) -> tuple[list[Pair], list[Pair]]:
    """(what leaves each layer, what it is given in place of what enters it), by layer.

    A student layer that stands for several of the teacher's is given what enters the first of these, and learns what leaves
    the last.
    """
    students, teachers = _stacks(program, _blocks(program), teacher, _blocks(teacher))
    left, fed = [], []
    for ours, theirs in zip(students, teachers):
        mapped = dict(_mapped(layers, len(ours), len(theirs)))
        for first, last in mapped.items():
            begin = 0 if first == 0 else mapped[first - 1] + 1 if first - 1 in mapped else last
            if begin > last:
                raise PassError(
                    f"layers=: layers {first - 1} and {first} of the program are paired with layers {begin - 1} and {last} of the "
                    "teacher, and what enters the second comes after what leaves it: pair later layers with later ones"
                )
            student = _separate(ours, first, "program")
            source, target = _separate(theirs, begin, "teacher").enters, _separate(theirs, last, "teacher")
            if shape(student.enters)[-1] != shape(source)[-1]:
                raise PassError(
                    f"layer {first} has {shape(student.enters)[-1]} channels and the teacher's hidden state {shape(source)[-1]}: a "
                    "layer cannot be given what is of another width; distill with on='hidden', which projects it"
                )
            left.append(Pair(f"layer {first}", student.leaves, target.leaves.name, shape(target.leaves)[-1]))
            fed.append(Pair(f"layer {first}", student.enters, source.name, None))
    return left, fed


def attention_pairs(
    program: Program, teacher: Program, layers: LayerMap, made: dict[str, Made]
) -> list[Pair]:
    """The scores of attentions; `made` gets what the teacher's are computed by."""
    pairs = []
    for name, student, target in _attentions(program, teacher, layers):
        if head_count(student) != head_count(target):
            raise PassError(
                f"{name} has {head_count(student)} heads and the teacher's {head_count(target)}: distill with on='relations', "
                "which needs no equal heads"
            )
        pairs.append(_pair(name, "attention", student, target, attention_scores, made))
    return pairs


def relation_pairs(
    program: Program, teacher: Program, layers: LayerMap, heads: int, made: dict[str, Made]
) -> list[Pair]:
    """The relations of queries, of keys and of values in self-attentions, cut into `heads` parts (0: the teacher's heads)."""
    pairs = []
    for name, student, target in _attentions(program, teacher, layers):
        if not (is_self_attention(program, student) and is_self_attention(teacher, target)):
            continue
        parts = heads or head_count(target)
        for what in (QUERIES, KEYS, VALUES):
            for whose, core in (("program", student), ("teacher", target)):
                size = relation_size(core, what)
                if size % parts:
                    raise PassError(
                        f"{name}: its {what} have {size} features in the {whose}, which is not a multiple of {parts} parts: give "
                        "relation_heads= a number that divides both"
                    )
            compute = partial(_relation, what, parts)
            pairs.append(_pair(f"{what} of {name}", f"{what}_relation", student, target, compute, made))
    if not pairs:
        raise PassError("no layers have self-attention whose relations could be compared: choose another on=")
    return pairs


def _relation(what: str, heads: int, editor: Editor, core: Core) -> fx.Node:
    return relation_scores(editor, core, what, heads)


def _pair(
    name: str,
    stem: str,
    student: Core,
    target: Core,
    compute: Callable[[Editor, Core], fx.Node],
    made: dict[str, Made],
) -> Pair:
    """A pair of what `compute` makes of the two attentions."""

    def of(core: Core, editor: Editor, nodes: Mapping[str, fx.Node]) -> fx.Node:
        return compute(editor, in_copy(core, nodes))

    output = f"{stem} of {target.node.name}"
    made[output] = partial(of, target)
    return Pair(name, partial(of, student), output, None)


def _attentions(program: Program, teacher: Program, layers: LayerMap) -> Iterator[tuple[str, Core, Core]]:
    """(name, the student's attention, the teacher's) for each pair of layers."""
    students, teachers = _stacks(program, layer_attentions(program), teacher, layer_attentions(teacher))
    for ours, theirs in zip(students, teachers):
        for first, second in _mapped(layers, len(ours), len(theirs)):
            mine, other = ours[first], theirs[second]
            if len(mine) != len(other) or not mine:
                raise PassError(
                    f"layer {first} of the program has {len(mine)} attentions that can be read, layer {second} of the teacher "
                    f"{len(other)}: pair other layers with layers="
                )
            for place, (student, target) in enumerate(zip(mine, other)):
                name = (
                    f"attention {place} of layer {first}" if len(mine) > 1 else f"attention of layer {first}"
                )
                if not (has_heads(student) and has_heads(target)):
                    raise PassError(f"{name}: its queries are not [batch, heads, positions, features]")
                yield name, student, target


def _blocks(program: Program) -> list[list[Block | str]]:
    """What enters and leaves the layers of each stack, or why that cannot be said."""
    found: dict[int, list[Block | str]] = {}
    for item in layer_blocks(program):
        found.setdefault(item.stack, []).append(item if isinstance(item, Block) else item.why)
    return list(found.values())


def _separate(blocks: Sequence[Block | str], number: int, whose: str) -> Block:
    block = blocks[number]
    if isinstance(block, str):
        raise PassError(
            f"layer {number} of the {whose} cannot be taken by itself ({block}): pair other layers with layers="
        )
    return block


def _stacks(
    program: Program, ours: Sequence[Ours], teacher: Program, theirs: Sequence[Theirs]
) -> tuple[Sequence[Ours], Sequence[Theirs]]:
    """Both, if they are of equally many stacks; a program that passes before this one have taken layers out of may have fewer."""
    if len(ours) != len(theirs) or not ours:
        raise MisplacedError(
            f"the program has {len(ours)} stacks of layers, the teacher {len(theirs)} (a layer is found by its like, so one alone is no "
            "stack): distill with on='outputs', or leave two layers in"
        )
    return ours, theirs


def _mapped(layers: LayerMap, student_layers: int, teacher_layers: int) -> Iterable[tuple[int, int]]:
    """The pairs of layers. Raises PassError for a number that is not there."""
    for first, second in layers:
        if not (0 <= first < student_layers and 0 <= second < teacher_layers):
            raise PassError(
                f"layers=({first}, {second}): the program's layers are 0 to {student_layers - 1}, "
                f"the teacher's 0 to {teacher_layers - 1}"
            )
    return layers or by_depth(student_layers, teacher_layers)


def by_depth(student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """Each layer of the student with the teacher's layer at the same relative depth, the last with the last."""
    return [
        (layer, max(0, round((layer + 1) * teacher_layers / student_layers) - 1))
        for layer in range(student_layers)
    ]


def program_of(teacher: Teacher, on: str) -> Program:
    """The teacher's program, of which values within are read. Raises PassError for an engine."""
    if teacher.program is None:
        what = "hidden states" if on == "hidden" else f"what on={on!r} reads"
        raise PassError(
            f"an engine does not expose {what}: give the teacher as a program, or distill on its outputs"
        )
    return teacher.program
