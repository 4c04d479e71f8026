"""Refuse models that keep state in buffers when they are only evaluated: a program computes outputs from inputs alone."""

from __future__ import annotations

import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.as_found import left_as_found
from bmgraph.frontend.kept_weights import weights_as_found
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error


def refuse_eval_state(program: Program, model: nn.Module) -> None:
    """Raise CaptureError if forward changes a buffer in eval mode, such as a counter or a cache of earlier inputs.

    The eval form drops what forward writes, so every call would start from the captured state. What is written in training
    only (running statistics) is no state of an engine. Leaves the model as it was.
    """
    if not program.writes or program.device.type == "meta":
        return
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with weights_as_found(model), left_as_found(model), torch.no_grad():
        model.eval()
        model(**program.example)
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
