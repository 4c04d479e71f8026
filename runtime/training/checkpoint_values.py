"""Whether the numbers of a checkpoint can be trained on: weights, moments and buffers that are not finite are told by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from bmgraph.errors import BundleError
from bmgraph.training.executor import written_in_place
from bmgraph.training.step_program import TENSOR, StepProgram

if TYPE_CHECKING:
    from bmgraph.runtime.training.trainer import Trainer

VALUE = "value"
"""Key in the file of a tensor's values, as in "value/up.weight"; the other keys are moments of the optimizer."""


def check_values(trainer: Trainer, path: Path, values: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Raise BundleError, naming the tensor, for values (by tensor, then by key) that no step leaves behind.

    These are NaN and infinity, and negative means of squares and variances, in what training changes. Constant buffers may
    hold -inf.
    """
    state = trainer.state
    variances = set(_variances(state))
    changing = {*state.trained, *state.writes, *written_in_place(state)}
    for name, found in values.items():
        for key, value in found.items() if name in changing else ():
            if not value.is_floating_point():
                continue
            wrong = ~value.isfinite()
            if key in trainer.optimizer.squares or (key == VALUE and name in variances):
                wrong |= value < 0
            count = int(wrong.sum())
            if count:
                what = f"{name!r}" if key == VALUE else f"the optimizer's {key} of {name!r}"
                first = float(value[wrong].flatten()[0])
                raise BundleError(
                    f"{path} holds {first} in {what} ({count} of {value.numel()} values), from which no training goes on: "
                    "load an earlier checkpoint; nothing was changed"
                )


def _variances(state: StepProgram) -> Iterator[str]:
    """The buffers that operators read as variances of what runs (those of a batch norm)."""
    for node in state.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args):
                if argument.name == "running_var" and isinstance(value, fx.Node) and TENSOR in value.meta:
                    yield str(value.meta[TENSOR])
