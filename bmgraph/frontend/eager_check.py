"""A captured program against its eager model, in eval and in training form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bmgraph.errors import CaptureError
from bmgraph.ir.eval_form import zero_dropout
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error

PROOF_TOLERANCE = 1e-4
"""Largest relative L2 distance between a captured program and its eager model, at float32."""


def run_eager(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        try:
            result = model(**tensors, **constants)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example: {type(error).__name__}: {error}"
            ) from error
    return tensor_leaves(result)


def tensor_leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def eval_disproof(program: Program, expected: list[torch.Tensor] | None) -> str:
    """Where the eval form differs from eager eval; empty where it does not, or on `meta`."""
    if expected is None:
        return ""
    found = program(**program.example)
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors where eager returns {len(expected)}"
    for (name, mine), theirs in zip(found.items(), expected):
        error = relative_error(mine, theirs)
        if not error <= PROOF_TOLERANCE:
            return f"its eval form differs from eager in {name} by {error:.1e} (relative)"
    return ""


def training_disproof(program: Program, model: nn.Module, constants: Mapping[str, Any]) -> str:
    """Where the training form without dropout differs from the eager model in training mode without dropout."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _NoDropout():
            expected = tensor_leaves(model(**program.example, **constants))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        torch.random.set_rng_state(rng)
    quiet = program.clone()
    zero_dropout(quiet.graph)
    quiet.buffers = {name: buffer.clone() for name, buffer in quiet.buffers.items()}
    with torch.no_grad():
        found = quiet.module(training=True)(*quiet.example.values())
    torch.random.set_rng_state(rng)
    for spec, mine, theirs in zip(program.outputs, found, expected):
        error = relative_error(mine, theirs)
        if not error <= PROOF_TOLERANCE:
            return f"its training form differs from eager in {spec.name} by {error:.1e} (relative)"
    return ""


class _NoDropout(TorchFunctionMode):
    """Runs a model in training mode with every dropout probability at 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        functional = torch.nn.functional
        if func in (
            functional.dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.alpha_dropout,
            torch.dropout,
        ):
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)
