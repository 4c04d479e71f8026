"""Capture a PyTorch model as a Program: the entry point, and which exports it tries."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.dynamic_dims import constrained_axes
from bmgraph.frontend.eager_check import eval_mismatch, run_eager, training_mismatch
from bmgraph.frontend.equal_dims import name_equal_dims, with_suggested_bounds
from bmgraph.frontend.eval_state import refuse_eval_state
from bmgraph.frontend.import_exported import import_exported
from bmgraph.ir.program import Program
from bmgraph.utils.user_frame import explain

Example = Mapping[str, Any] | Sequence[Any]


def capture(model: nn.Module, example: Example, *, dynamic: bool = True, prove: bool = True) -> Program:
    """Capture a model as a Program.

    `example` holds the inputs of `forward`: a dict by name, or a tuple in order. Values that are not tensors (flags)
    become constants of the program. With `dynamic`, every axis that the model allows has a dynamic size;
    `program.fixed` lists the batch and sequence axes that do not. A batch of 1 is repeated to 2, because export
    would fix its size. With `prove`, the eval form and the training form are compared with the eager model on the
    example (never on the `meta` device).

    Raises CaptureError if the model cannot be captured; the message says where and what to do.

    Example:
        >>> import torch, bmgraph as bg
        >>> program = bg.capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> list(program.parameters)
        ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module to capture, found a {type(model).__name__}")
    inputs = _inputs_by_name(model, example)
    # export would tie the sizes of a view to the strides of the larger tensor
    tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    if not tensors:
        raise CaptureError("the example has no tensor: give at least one input of the model's forward")
    _check_weights(model)
    tensors = _repeat_batch_of_one(tensors)
    constants = {**_default_flags(model, inputs), **constants}
    was_training = model.training
    try:
        program = _capture_best(model, tensors, constants, dynamic, prove)
        refuse_eval_state(program, model, constants)
    finally:
        model.train(was_training)
    return program


def _inputs_by_name(model: nn.Module, example: Example) -> dict[str, Any]:
    """The example as a dict by input of forward; raises CaptureError if it does not fit forward."""
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, Mapping):
        names = [name for name, item in parameters.items() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(example) > len(names):
            raise CaptureError(
                f"the example has {len(example)} inputs, but forward takes {len(names)}: {', '.join(names)}"
            )
        example = dict(zip(names, example))
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name, value in example.items():
        if name not in parameters and not open_ended:
            raise CaptureError(f"forward has no input {name!r}; it takes {', '.join(parameters)}")
        if not isinstance(value, (torch.Tensor, bool, int, float, str, type(None))):
            raise CaptureError(
                f"input {name!r} is a {type(value).__name__}: give tensors or flags (bool, int, float, str, None)"
            )
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty
        and item.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        and name not in example
    ]
    if missing:
        raise CaptureError(f"the example lacks {', '.join(map(repr, missing))}, which forward needs")
    return dict(example)


def _check_weights(model: nn.Module) -> None:
    """Raise CaptureError if a parameter is not finite; the sum is a cheap test that passes for most."""
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(
            torch.isfinite(parameter.detach()).all()
        ):
            raise CaptureError(
                f"parameter {name!r} holds NaN or infinity: load valid weights before capturing"
            )


def _repeat_batch_of_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repeat a batch of 1, because export would fix its size."""
    with_batch = [tensor for tensor in tensors.values() if tensor.dim() > 0]
    if not with_batch or any(tensor.shape[0] != 1 for tensor in with_batch):
        return tensors
    return {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }


def _default_flags(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Turn off the KV cache that a forward can return: a pass adds its own."""
    parameters = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in parameters and "use_cache" not in inputs else {}


def _capture_best(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool, prove: bool
) -> Program:
    """Capture in training mode; if either form differs from eager, capture in eval mode, which cannot train."""
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    prove = prove and not meta
    expected = run_eager(model, tensors, constants) if prove else None
    try:
        model.train()
        program = _export(model, tensors, constants, dynamic)
        reason = eval_mismatch(program, expected) or (
            training_mismatch(program, model, constants) if prove else ""
        )
    except CaptureError as error:
        program, reason = None, f"capture in training mode failed: {error}"
    if program is not None and not reason:
        return program
    model.eval()
    program = _export(model, tensors, constants, dynamic)
    program.training = reason
    mismatch = eval_mismatch(program, expected)
    if mismatch:
        raise CaptureError(
            f"the captured program differs from the model: {mismatch}; please report this model's forward"
        )
    return program


def _export(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool
) -> Program:
    """Export with as many dynamic sizes as the model allows."""
    program = _export_independent_dims(model, tensors, constants, dynamic)
    if not dynamic or not program.fixed:
        return program
    shared = _export_shared_dims(model, tensors, constants)
    return shared if shared and len(shared.fixed) < len(program.fixed) else program


def _export_shared_dims(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any]
) -> Program | None:
    """Export with one dimension for all sizes that are equal in the example; None if the model does not allow it.

    A loss over flattened logits and labels compares products of sizes. Export then fixes dimensions that are declared
    independent, but keeps shared ones dynamic.
    """
    shapes = name_equal_dims(tensors)
    while shapes:
        try:
            exported = _run_export(model, tensors, constants, shapes)
            return None if _constrained(exported, tensors) else import_exported(model, exported, tensors)
        except Exception as error:  # torch.export raises many types; one of them suggests bounds
            shapes = with_suggested_bounds(shapes, str(error))
    return None


def _export_independent_dims(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool
) -> Program:
    """Export with as many dynamic axes as the model allows, each of its own size."""
    everywhere = {name: set(range(tensor.dim())) for name, tensor in tensors.items()}
    batch_only = {name: {0} & axes for name, axes in everywhere.items()}
    nowhere: dict[str, set[int]] = {name: set() for name in tensors}
    failure: Exception | None = None
    attempts = [everywhere, batch_only, nowhere] if dynamic else [nowhere]
    while attempts:
        axes = attempts.pop(0)
        shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.AUTO) or None for name in tensors}
        try:
            exported = _run_export(model, tensors, constants, shapes)
            constrained = _constrained(exported, tensors)
            if constrained:
                attempts.insert(0, {name: kept - constrained.get(name, set()) for name, kept in axes.items()})
                continue
            return import_exported(model, exported, tensors)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises many types; the first is reported below
            failure = failure or error
    assert failure is not None
    raise CaptureError(explain(failure)) from failure


def _run_export(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    with _no_export_warnings():
        return torch.export.export(
            model,
            (),
            {**tensors, **constants},
            dynamic_shapes=_dynamic_shapes(model, {**shapes, **dict.fromkeys(constants)}),
            strict=False,
        )


def _constrained(
    exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> dict[str, set[int]]:
    """Axes that export reports as dynamic although the traced graph is valid for some of their sizes only."""
    fake = {
        node.name: node.meta["val"]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in tensors
    }
    return constrained_axes(fake, exported.range_constraints)


def _dynamic_shapes(model: nn.Module, shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes by parameter of forward; those of inputs in its `**kwargs` are nested under that parameter's name."""
    parameters = inspect.signature(model.forward).parameters
    named = {name: value for name, value in shapes.items() if name in parameters}
    rest = {name: value for name, value in shapes.items() if name not in parameters}
    collector = [name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD]
    return {**named, collector[0]: rest} if rest else named


@contextmanager
def _no_export_warnings() -> Iterator[None]:
    """Silence torch.export: capture raises or lists what matters."""
    import logging
    import warnings

    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
