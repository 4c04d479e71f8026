"""Compare the two forms of a program, eval and training, with the outputs of the eager model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from bmgraph.errors import CaptureError
from bmgraph.frontend.half_precision import rounding_bounds
from bmgraph.ir.eval_form import zero_dropout
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error

EAGER_TOLERANCE = 1e-4
"""Largest relative L2 error of a program's output against its eager model."""


def run_eager(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The output tensors of the model in eval mode; raises CaptureError if it does not run on the inputs."""
    model.eval()
    with torch.no_grad():
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


def eval_mismatch(
    program: Program,
    model: nn.Module,
    constants: Mapping[str, Any],
    expected: list[torch.Tensor] | None,
) -> str:
    """How the eval form differs from the eager outputs; empty if it does not, or if `expected` is None."""
    if expected is None:
        return ""

    def run(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return _eager_outputs(model, inputs, constants, training=False)

    found = program(**program.example)
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors where eager returns {len(expected)}"
    bounds = rounding_bounds(model, program.example, expected, run, EAGER_TOLERANCE)
    difference = _difference(list(found), list(found.values()), expected, bounds)
    return difference and f"its eval form differs from eager in {difference}"


def training_mismatch(program: Program, model: nn.Module, constants: Mapping[str, Any]) -> str:
    """How the training form differs from eager training mode, both without dropout; empty if it does not.

    Restores the buffers of the model and the state of the random generator.
    """

    def run(inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return _eager_outputs(model, inputs, constants, training=True)

    rng = torch.random.get_rng_state()
    expected = run(program.example)
    bounds = rounding_bounds(model, program.example, expected, run, EAGER_TOLERANCE)
    copy = program.clone()
    zero_dropout(copy.graph)
    copy.buffers = {name: buffer.clone() for name, buffer in copy.buffers.items()}
    with torch.no_grad():
        found = copy.module(training=True)(*copy.example.values())
    torch.random.set_rng_state(rng)
    difference = _difference([spec.name for spec in program.outputs], found, expected, bounds)
    return difference and f"its training form differs from eager in {difference}"


def _eager_outputs(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], constants: Mapping[str, Any], training: bool
) -> list[torch.Tensor]:
    """The model's output tensors, without dropout; restores its buffers and the state of the random generator."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train(training)
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _NoDropout():
            return _tensor_leaves(model(**inputs, **constants))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        torch.random.set_rng_state(rng)


def _difference(
    names: Sequence[str],
    found: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    bounds: Sequence[float],
) -> str:
    """The first output whose relative error is above its bound, and by how much; empty if none is."""
    for name, actual, reference, bound in zip(names, found, expected, bounds):
        error = relative_error(actual, reference)
        if not error <= bound:
            rounding = f", more than half precision rounds ({bound:.1e})" if bound > EAGER_TOLERANCE else ""
            return f"{name} by {error:.1e} (relative){rounding}"
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
