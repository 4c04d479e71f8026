"""Refuse models that keep state in buffers when they are only evaluated: a program computes outputs from inputs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error


def refuse_eval_state(program: Program, model: nn.Module, constants: Mapping[str, Any] | None = None) -> None:
    """Raise CaptureError if forward changes a buffer in eval mode, such as a counter or a cache of earlier inputs.

    The eval form drops what forward writes, so every call would start from the captured state. What is written in training
    only (running statistics) is no state of an engine. Leaves the model as it was.
    """
    if not program.writes or program.device.type == "meta":
        return
    with left_untouched(model) as before:
        model.eval()
        with torch.no_grad():
            model(**program.example, **(constants or {}))
        changed = [
            name
            for name, buffer in model.named_buffers()
            if name in before and relative_error(buffer, before[name]) > 0
        ]
    if changed:
        raise CaptureError(
            f"forward changes {', '.join(changed)} in eval mode too, and a program keeps no state between calls: "
            "take the state as an input of forward and return its new value"
        )


@contextmanager
def left_untouched(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Gives copies of the buffers by name; afterwards buffers, modes and the random generator are what they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {name: buffer.detach().clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    generator = torch.random.get_rng_state()
    try:
        yield values
    finally:
        torch.random.set_rng_state(generator)
        for module, mode in modes.items():
            module.training = mode
            module._buffers.update(buffers[module])
        with torch.no_grad():
            for name, buffer in model.named_buffers(remove_duplicate=False):
                buffer.copy_(values[name])
