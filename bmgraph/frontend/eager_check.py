"""Compare the two forms of a program, eval and training, with the outputs of the eager model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bmgraph.errors import CaptureError
from bmgraph.frontend.eval_state import left_untouched
from bmgraph.ir.eval_form import zero_dropout
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error

EAGER_TOLERANCE = 1e-4
"""Largest relative L2 error of a program's output against its eager model."""


def run_eager(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The output tensors of the model in eval mode; raises CaptureError if it does not run on the inputs."""
    with left_untouched(model), torch.no_grad():
        model.eval()
        try:
            result = model(**tensors, **constants)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example: {type(error).__name__}: {error}"
            ) from error
    return _tensor_leaves(result)


def _tensor_leaves(result: Any) -> list[torch.Tensor]:
    """The tensors in a model's output, in order."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def eval_mismatch(program: Program, expected: list[torch.Tensor] | None) -> str:
    """How the eval form differs from the eager outputs; empty if it does not, or if `expected` is None."""
    if expected is None:
        return ""
    found = program(**program.example)
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors where eager returns {len(expected)}"
    for (name, actual), reference in zip(found.items(), expected):
        error = relative_error(actual, reference)
        if not error <= EAGER_TOLERANCE:
            return f"its eval form differs from eager in {name} by {error:.1e} (relative)"
    return ""


def training_mismatch(program: Program, model: nn.Module, constants: Mapping[str, Any]) -> str:
    """How the training form differs from eager training mode, both without dropout; empty if it does not.

    Restores the buffers of the model and the state of the random generator.
    """
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _NoDropout():
            expected = _tensor_leaves(model(**program.example, **constants))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        torch.random.set_rng_state(rng)
    copy = program.clone()
    zero_dropout(copy.graph)
    copy.buffers = {name: buffer.clone() for name, buffer in copy.buffers.items()}
    with torch.no_grad():
        found = copy.module(training=True)(*copy.example.values())
    torch.random.set_rng_state(rng)
    for spec, actual, reference in zip(program.outputs, found, expected):
        error = relative_error(actual, reference)
        if not error <= EAGER_TOLERANCE:
            return f"its training form differs from eager in {spec.name} by {error:.1e} (relative)"
    return ""


class _NoDropout(TorchFunctionMode):
    """Runs a model with every dropout probability set to 0."""

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
