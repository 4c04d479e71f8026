"""Distill: the pass that trains a student on a teacher's outputs, hidden states or attentions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.deltas.backbone import backbone_of
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.input_check import check_inputs
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import shape
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.distill.layer_pairs import (
    attention_pairs,
    embedding_pairs,
    hidden_pairs,
    layer_wise_pairs,
    program_of,
    relation_pairs,
)
from bmgraph.passes.distill.likeliest import Likeliest
from bmgraph.passes.distill.objective import (
    COSINE,
    DIVERGENCE,
    MAP_DIVERGENCE,
    MAP_SQUARES,
    SQUARES,
    Objective,
    Pair,
    objective_program,
)
from bmgraph.passes.distill.teacher import Made, Teacher, select_inputs
from bmgraph.passes.distill.teacher_cache import TeacherCache
from bmgraph.utils.byte_size import bytes_of
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.kept_calls import check_kept_calls
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch

LOGITS, OUTPUTS, HIDDEN, COSINES = "logits", "outputs", "hidden", "cosine"
EMBEDDINGS, ATTENTION, ATTENTION_KL, RELATIONS, LAYER_WISE = (
    "embeddings", "attention", "attention_kl", "relations", "layerwise",
)  # fmt: skip
OBJECTIVES = {
    LOGITS: DIVERGENCE,
    OUTPUTS: SQUARES,
    HIDDEN: SQUARES,
    COSINES: COSINE,
    EMBEDDINGS: SQUARES,
    ATTENTION: MAP_SQUARES,
    ATTENTION_KL: MAP_DIVERGENCE,
    RELATIONS: MAP_DIVERGENCE,
    LAYER_WISE: SQUARES,
}
"""What the student is trained on -> what is compared at each position."""

OF_LAYERS = (HIDDEN, ATTENTION, ATTENTION_KL, RELATIONS, LAYER_WISE)
"""Objectives whose layers are paired."""

Values = Callable[[Batch, set[str], Callable[[Mapping[str, torch.Tensor]], object]], dict[str, torch.Tensor]]
"""(batch, names, what raises InputError for values that do not fit) -> the teacher's values by name."""


@dataclass(frozen=True, repr=False)
class Distill(ModelPass):
    """Train all parameters that are not frozen, for `steps` steps, to match `teacher` on the batches of `data`.

    teacher: name of a resource: a program, a model or an engine, of any architecture that reads the same inputs.
    data: name of a resource: batches, repeated where there are fewer than `steps`. on: what is compared, one of the following
    or several, added by `weights` (by default 1 each).

    - "logits": the divergence KL(teacher, student) of the outputs named logits at `temperature`, times temperature squared.
    - "outputs": the mean squared error of all float outputs that both have; "cosine": one minus their cosine.
    - "hidden": the mean squared error of the hidden states after the layers; "embeddings": of what enters the first layer.
    - "attention": the mean squared error of attention maps, the softmax of scores f[B, H, S, T] over T keys, scaled and masked as
      the model does; "attention_kl": their KL(teacher, student), of each query, as a mean over heads. Both need as many heads as the
      teacher has.
    - "relations": KL(teacher, student) of the relations of queries, of keys and of values in self-attentions: softmax of the
      products of positions, heads together cut into `relation_heads` parts (0: as many as the teacher has heads).
    - "layerwise", by itself: each layer is given what enters the teacher's, and learns what leaves it, by mean squared error.
      Only layers train; what else they read (masks, positions, an encoder's output) is the student's own.

    top_k: of the logits, only that many of the teacher's largest are compared (0: all): at the temperature, the divergence of their
    probabilities and of all others together as one class. It is the whole divergence at most, and a cache of it is small: of 150,000
    classes a position takes 600 kB, of the 64 largest half a kB.
    hard: the share of the program's own loss, which reads labels from the batches; the rest is the teacher's. layers: pairs
    (student layer, teacher layer) counted from 0, or a table {student layer: teacher layer}; by default each student layer is paired
    with the teacher layer at the same relative depth, the last with the last. Where hidden sizes differ, a projection of the
    student's value is trained with it and then discarded. Padding and soft prompts do not count.
    Where the rows of a batch select deltas, they cycle through all of them.

    The resource "trainer" sets the optimizer and the step passes, `Torch(optimizer=AdamW(lr=...), passes=(ZeRO(3),))`; it
    is optional. So is the resource named by `cache`, a folder: what the teacher gives for a batch is kept there, as safetensors under
    a digest of the teacher and the batch, and read instead of running the teacher again, in later epochs and by later runs. It
    holds at most `cache_limit` bytes; a file that is not whole is computed again. Every rank runs the teacher on the whole batch.
    Raises PassError where outputs or layers of the two do not match, ResourceError where the teacher, a batch or the cache cannot
    be used.

    Sources: Hinton et al. 2015 (arXiv:1503.02531); hidden states, embeddings and attention maps: Jiao et al. 2020
    (arXiv:1909.10351), which compares scores before softmax; their divergence: Wang et al. 2020 (arXiv:2002.10957); relations:
    Wang et al. 2021 (arXiv:2012.15828), of one layer there, `layers=((5, 11),)`.
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
    relation_heads: int = 0
    cache: str = "cache"
    cache_limit: str = "16GB"
    top_k: int = field(default=0, kw_only=True)

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
        if self.layers and not set(self._on) & set(OF_LAYERS):
            raise InputError(f"layers= pairs layers: give on= one of {', '.join(OF_LAYERS)} with it")
        if LAYER_WISE in self._on and (len(self._on) > 1 or self.hard):
            raise InputError(
                f"on={LAYER_WISE!r} gives each layer what enters the teacher's, so that nothing runs from end to end: distill on "
                "anything else, and on hard labels, in a Distill of its own"
            )
        if self.relation_heads < 0 or (self.relation_heads and RELATIONS not in self._on):
            raise InputError(
                f"relation_heads={self.relation_heads}: give a number of parts, with on={RELATIONS!r}"
            )
        if self.top_k < 0 or (self.top_k and LOGITS not in self._on):
            raise InputError(f"top_k={self.top_k}: give how many logits to keep, with on={LOGITS!r}")
        if not bytes_of(self.cache_limit):
            raise InputError(f"cache_limit={self.cache_limit!r}: give a number of bytes, such as '16GB'")

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
        made: dict[str, Made] = {}
        found = [self._pairs(program, teacher, on, made) for on in self._on]
        kept = [pair.likeliest for found_of, _ in found for pair in found_of if pair.likeliest is not None]
        teacher = teacher.returning(made).keeping(kept)
        objectives = [
            Objective(pairs, OBJECTIVES[on], weight)
            for (pairs, _), on, weight in zip(found, self._on, self.weights or (1.0,) * len(self._on))
        ]
        pairs = [pair for item in objectives for pair in item.pairs]
        fed = [pair for _, given in found for pair in given]
        objective = objective_program(
            program, objectives, self.temperature, self.hard, self.seed, str(self), fed
        )
        values = self._values(teacher, context)

        read = [*pairs, *fed]
        asked = {pair.teacher for pair in read} | {item.classes for item in kept}
        dtypes = {spec.name: spec.dtype for spec in objective.inputs}

        def whole(named: Batch, values: Mapping[str, torch.Tensor]) -> Batch:
            targets: dict[str, torch.Tensor] = {}
            for place, pair in enumerate(read):
                for name, value in pair.targets(
                    place, values
                ).items():  # a teacher may compute in half precision
                    targets[name] = value.to(dtypes[name]) if value.is_floating_point() else value
            return select_inputs({**named, **targets}, objective.inputs, "the program")

        def check(named: Batch, values: Mapping[str, torch.Tensor]) -> None:
            check_inputs(objective.inputs, objective.ranges, whole(named, values))

        def batches() -> Iterator[Batch]:
            for step, batch in enumerate(context.cycle(self.data, self.steps)):
                named = {**batch, **fill_categorical(program.inputs, batch, start=step)}
                yield whole(named, values(batch, asked, partial(check, named)))

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

    def fits(self, program: Program, context: Context) -> bool:
        """Whether what is compared is found in both; raises what `run` would where it is not."""
        teacher = Teacher.of(context.resource(self.teacher), next(iter(context.batches(self.data, 1))))
        return all(self._pairs(program, teacher, on, {}) for on in self._on)

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Training changes tensors, and no call."""
        check_kept_calls(before, after, str(self))

    def _values(self, teacher: Teacher, context: Context) -> Values:
        """What gives the teacher's values for a batch: the teacher, or a cache of it."""
        if not context.has(self.cache):
            return lambda batch, names, fits: teacher.values(batch, names)
        # not asked for by `resource`: whatever it holds the result is the same, so its path is no part of the record
        folder = context.resources[self.cache]
        if not isinstance(folder, (str, os.PathLike)):
            raise ResourceError(
                f"resource {self.cache!r} is a {type(folder).__name__}: give the path of a folder"
            )
        limit = bytes_of(self.cache_limit)
        assert limit is not None
        return TeacherCache(folder, teacher, context.digests[self.teacher], limit).values

    def _pairs(
        self, program: Program, teacher: Teacher, on: str, made: dict[str, Made]
    ) -> tuple[list[Pair], list[Pair]]:
        """The values of the student and the teacher that an objective compares, and those of the student that the teacher's take
        the place of; `made` gets what the teacher must compute for it."""
        if on == LAYER_WISE:
            return layer_wise_pairs(program, program_of(teacher, on), self.layers)
        if on == HIDDEN:
            return hidden_pairs(program, program_of(teacher, on), self.layers), []
        if on == EMBEDDINGS:
            return embedding_pairs(program, program_of(teacher, on)), []
        if on in (ATTENTION, ATTENTION_KL):
            return attention_pairs(program, program_of(teacher, on), self.layers, made), []
        if on == RELATIONS:
            return (
                relation_pairs(program, program_of(teacher, on), self.layers, self.relation_heads, made),
                [],
            )
        return self._output_pairs(program, teacher, on), []

    def _output_pairs(self, program: Program, teacher: Teacher, on: str) -> list[Pair]:
        """The outputs of both that are compared."""
        returned: Any = output_node(program.graph).args[0]
        nodes: dict[str, fx.Node] = {}
        known = {spec.name: spec for spec in teacher.outputs}
        pairs = []
        for spec, node in zip(program.outputs, returned):
            comparable = (
                spec.dtype.is_floating_point and spec.name not in program.losses and spec.name in known
            )
            if comparable and (on != LOGITS or (spec.shape and spec.name.split(".")[-1] == LOGITS)):
                width = _width(spec, known[spec.name])
                if on != COSINES or width is not None:
                    pairs.append(Pair(spec.name, node, spec.name, width))
                    nodes[spec.name] = node
        if not pairs:
            mine, theirs = (
                ", ".join(spec.name for spec in found) for found in (program.outputs, known.values())
            )
            raise PassError(
                f"nothing to distill on {on}: the outputs of the program are {mine}, of the teacher {theirs}; "
                f"choose another on= of {', '.join(OBJECTIVES)}"
            )
        for pair in pairs:
            classes = pair.student.split(".")[-1] == LOGITS  # no projection of other classes would mean these
            if classes and pair.width not in (None, shape(nodes[pair.student])[-1]):
                raise PassError(
                    f"the teacher's {pair.teacher} are over {pair.width} classes, the program's over "
                    f"{shape(nodes[pair.student])[-1]}: distill with on={HIDDEN!r}"
                )
        return [self._kept(pair) for pair in pairs] if on == LOGITS and self.top_k else pairs

    def _kept(self, pair: Pair) -> Pair:
        """A pair of logits, of which the teacher's likeliest are kept; as it is where they are not more."""
        if pair.width is None or pair.width <= self.top_k:
            return pair
        likeliest = Likeliest(pair.teacher, self.top_k, self.temperature)
        return replace(pair, teacher=likeliest.probabilities, likeliest=likeliest)


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
