"""One interface to a teacher, whether it is a program, a model or an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bmgraph.analysis.interpreter import Observed
from bmgraph.errors import ResourceError
from bmgraph.frontend.capture import capture
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.verify.reference_outputs import Batch


@dataclass(frozen=True)
class Teacher:
    """The teacher's outputs, a function `values(batch, names)` that computes named values, and its program if it has one."""

    outputs: tuple[TensorSpec, ...]
    values: Callable[[Batch, set[str]], dict[str, torch.Tensor]]
    program: Program | None = None

    @staticmethod
    def of(teacher: Any, batch: Batch) -> Teacher:
        """Wrap a program, a model (captured with the batch), or a callable with `inputs` and `outputs`, such as an engine.

        Raises ResourceError for anything else.
        """
        if isinstance(teacher, nn.Module):
            takes = inspect.signature(teacher.forward).parameters
            teacher = capture(teacher, {name: item for name, item in batch.items() if name in takes})
        if isinstance(teacher, Program):
            served = deployed(teacher)
            observed = Observed(served)

            def values(batch: Batch, names: set[str]) -> dict[str, torch.Tensor]:
                seen: dict[str, torch.Tensor] = {}
                outputs = observed.run(
                    select_inputs(batch, served.inputs, "the teacher"), names, seen.__setitem__
                )
                return {**outputs, **seen}

            return Teacher(served.outputs, values, served)
        if not (callable(teacher) and hasattr(teacher, "inputs") and hasattr(teacher, "outputs")):
            raise ResourceError(
                f"the teacher is a {type(teacher).__name__}: give a program, a model or an engine"
            )
        return Teacher(
            teacher.outputs,
            lambda batch, names: teacher(**select_inputs(batch, teacher.inputs, "the teacher")),
        )


def select_inputs(batch: Batch, inputs: tuple[TensorSpec, ...], whose: str) -> dict[str, torch.Tensor]:
    """The tensors of a batch for the given inputs; raises ResourceError where one is missing."""
    for spec in inputs:
        if spec.name not in batch:
            raise ResourceError(
                f"a batch of the distillation data lacks input {spec.name!r} of {whose}: it has {', '.join(batch)}"
            )
    return {spec.name: batch[spec.name] for spec in inputs}
