"""One interface to a teacher, whether it is a program, a model or an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from bmgraph.analysis.interpreter import Observed
from bmgraph.errors import CaptureError, InputError, ResourceError
from bmgraph.frontend.capture import capture
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims, value
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes.distill.likeliest import Likeliest
from bmgraph.verify.reference_outputs import Batch

Made = Callable[[Editor, Mapping[str, fx.Node]], fx.Node]
"""Adds a value to a program, given an editor of it and its nodes by name."""


@dataclass(frozen=True)
class Teacher:
    """The teacher's outputs, a function `values(batch, names)` that computes named values, and its program if it has one."""

    outputs: tuple[TensorSpec, ...]
    values: Callable[[Batch, set[str]], dict[str, torch.Tensor]]
    program: Program | None = None
    inputs: tuple[TensorSpec, ...] = ()

    @staticmethod
    def of(teacher: Any, batch: Batch) -> Teacher:
        """Wrap a program, a model (captured with the batch), or a callable with `inputs` and `outputs`, such as an engine.

        Raises ResourceError for anything else, and for a model that does not run on the batch.
        """
        if isinstance(teacher, nn.Module):
            takes = inspect.signature(teacher.forward).parameters
            try:
                teacher = capture(teacher, {name: item for name, item in batch.items() if name in takes})
            except CaptureError as error:
                raise ResourceError(
                    f"the teacher does not run on the first batch of the distillation data, which is made for the program: {error}; a "
                    "teacher with another vocabulary or other inputs needs data of its own: distill its outputs as labels instead"
                ) from error
        if isinstance(teacher, Program):
            return Teacher._of_program(deployed(teacher))
        if not (callable(teacher) and hasattr(teacher, "inputs") and hasattr(teacher, "outputs")):
            raise ResourceError(
                f"the teacher is a {type(teacher).__name__}: give a program, a model or an engine"
            )
        return Teacher(
            teacher.outputs,
            lambda batch, names: teacher(**select_inputs(batch, teacher.inputs, "the teacher")),
            inputs=teacher.inputs,
        )

    @staticmethod
    def _of_program(served: Program) -> Teacher:
        observed = Observed(served)

        def values(batch: Batch, names: set[str]) -> dict[str, torch.Tensor]:
            seen: dict[str, torch.Tensor] = {}
            given = select_inputs(batch, served.inputs, "the teacher")
            try:
                outputs = observed.run(given, names, seen.__setitem__)
            except InputError as error:
                raise ResourceError(
                    f"the teacher does not take a batch of the distillation data: {error}"
                ) from error
            return {**outputs, **seen}

        return Teacher(served.outputs, values, served, served.inputs)

    def keeping(self, kept: Sequence[Likeliest]) -> Teacher:
        """The same teacher, which also gives the likeliest of its logits, by their names."""
        if not kept:
            return self

        def values(batch: Batch, names: set[str]) -> dict[str, torch.Tensor]:
            asked = [item for item in kept if names & {item.probabilities, item.classes}]
            own = names - {name for item in asked for name in (item.probabilities, item.classes)}
            found = dict(self.values(batch, own | {item.output for item in asked}))
            for item in asked:
                found |= item.of(found[item.output].detach())
            return found

        return replace(self, values=values)

    def returning(self, made: Mapping[str, Made]) -> Teacher:
        """The same teacher, whose program also returns what `made` adds, by the names of new outputs."""
        if not made:
            return self
        assert self.program is not None
        program = self.program.clone()
        nodes = {node.name: node for node in program.graph.nodes}
        output = output_node(program.graph)
        with program.edit() as editor:
            added = {name: make(editor, nodes) for name, make in made.items()}
            known: Any = output.args[0]
            output.args = ((*known, *added.values()),)
        program.outputs = (
            *program.outputs,
            *(
                TensorSpec(name, value(node).dtype, dims(program, value(node)))
                for name, node in added.items()
            ),
        )
        return Teacher._of_program(program)


def select_inputs(batch: Batch, inputs: tuple[TensorSpec, ...], whose: str) -> dict[str, torch.Tensor]:
    """The tensors of a batch for the given inputs; raises ResourceError where one is missing."""
    for spec in inputs:
        if spec.name not in batch:
            raise ResourceError(
                f"a batch of the distillation data lacks input {spec.name!r} of {whose}: it has {', '.join(batch)}"
            )
    return {spec.name: batch[spec.name] for spec in inputs}
