"""From a PyTorch model to a Program: export, normal form, proof against eager."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.dynamic_dims import bound_axes
from bmgraph.frontend.eager_check import eval_disproof, run_eager, training_disproof
from bmgraph.frontend.equal_dims import equal_as_one, within_bounds
from bmgraph.frontend.import_exported import program_of
from bmgraph.ir.program import Program
from bmgraph.utils.user_frame import explain

Example = Mapping[str, Any] | Sequence[Any]


def capture(model: nn.Module, example: Example, *, dynamic: bool = True, prove: bool = True) -> Program:
    """Capture a model as a Program.

    `example` is a dict of the inputs of `forward` by name, or a tuple in its order; values that are no tensors
    (flags) are baked in. Sizes are dynamic where the model allows it (with `dynamic`); what stayed fixed is
    listed in `program.fixed`. A batch of 1 is repeated to 2, since export would fix it. The result is compared
    with the eager model on the example, in eval and in training form (with `prove`; never on `meta`).

    Raises CaptureError where the model cannot be captured, saying where and what to do.

    Example:
        >>> import torch, bmgraph as bg
        >>> program = bg.capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> list(program.parameters)
        ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module to capture, found a {type(model).__name__}")
    inputs = _named(model, example)
    # a slice of something larger would tie its sizes to those strides
    tensors = {name: value.contiguous() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    if not tensors:
        raise CaptureError("the example holds no tensor: give at least one input of the model's forward")
    _check_weights(model)
    tensors = _at_least_two(tensors)
    constants = {**_quiet_flags(model, inputs), **constants}
    was_training = model.training
    try:
        program = _capture_best(model, tensors, constants, dynamic, prove)
    finally:
        model.train(was_training)
    return program


def _named(model: nn.Module, example: Example) -> dict[str, Any]:
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
                f"input {name!r} is a {type(value).__name__}: give tensors, or flags that are baked in"
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
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(
            torch.isfinite(parameter.detach()).all()
        ):
            raise CaptureError(
                f"parameter {name!r} holds NaN or infinity: load sound weights before capturing"
            )


def _at_least_two(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repeat a batch of 1, which export would fix for good."""
    with_batch = [tensor for tensor in tensors.values() if tensor.dim() > 0]
    if not with_batch or any(tensor.shape[0] != 1 for tensor in with_batch):
        return tensors
    return {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }


def _quiet_flags(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward that can return its key-value cache is asked not to: generation makes its own."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes and "use_cache" not in inputs else {}


def _capture_best(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool, prove: bool
) -> Program:
    """The training capture if it is proven to give the eval form; else the eval capture, which cannot train."""
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    prove = prove and not meta
    expected = run_eager(model, tensors, constants) if prove else None
    try:
        model.train()
        program = _export(model, tensors, constants, dynamic)
        reason = eval_disproof(program, expected) or (
            training_disproof(program, model, constants) if prove else ""
        )
    except CaptureError as error:
        program, reason = None, f"capturing its training form failed: {error}"
    if program is not None and not reason:
        return program
    model.eval()
    program = _export(model, tensors, constants, dynamic)
    program.training = reason
    wrong = eval_disproof(program, expected)
    if wrong:
        raise CaptureError(
            f"the captured program is not the model: {wrong}; please report this model's forward"
        )
    return program


def _export(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool
) -> Program:
    """Export with as many dynamic sizes as the model takes."""
    program = _freest(model, tensors, constants, dynamic)
    if not dynamic or not program.fixed:
        return program
    freer = _with_equal_sizes_as_one(model, tensors, constants)
    return freer if freer and len(freer.fixed) < len(program.fixed) else program


def _with_equal_sizes_as_one(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any]
) -> Program | None:
    """Export with sizes that are equal in the example told as one, or None where the model does not take that.

    Labels are compared with logits by the product of their sizes, which fixes sizes that are free one by one.
    """
    shapes = equal_as_one(tensors)
    while shapes:
        try:
            exported = _exported(model, tensors, constants, shapes)
            return None if _bound(exported, tensors) else program_of(model, exported, tensors)
        except Exception as error:  # torch.export raises many kinds; one of them says bounds to keep to
            shapes = within_bounds(shapes, str(error))
    return None


def _freest(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool
) -> Program:
    """Export with the most axes free, each by itself, that the model takes."""
    everywhere = {name: set(range(tensor.dim())) for name, tensor in tensors.items()}
    batch_only = {name: {0} & axes for name, axes in everywhere.items()}
    nowhere: dict[str, set[int]] = {name: set() for name in tensors}
    failure: Exception | None = None
    attempts = [everywhere, batch_only, nowhere] if dynamic else [nowhere]
    while attempts:
        axes = attempts.pop(0)
        shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.AUTO) or None for name in tensors}
        try:
            exported = _exported(model, tensors, constants, shapes)
            bound = _bound(exported, tensors)
            if bound:
                attempts.insert(0, {name: free - bound.get(name, set()) for name, free in axes.items()})
                continue
            return program_of(model, exported, tensors)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises many kinds; each is told below
            failure = failure or error
    assert failure is not None
    raise CaptureError(explain(failure)) from failure


def _exported(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    with _quiet():
        return torch.export.export(
            model,
            (),
            {**tensors, **constants},
            dynamic_shapes=_shapes_of(model, {**shapes, **dict.fromkeys(constants)}),
            strict=False,
        )


def _bound(exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """Axes that the export calls dynamic although the traced graph holds for some of their sizes only."""
    fake = {
        node.name: node.meta["val"]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in tensors
    }
    return bound_axes(fake, exported.range_constraints)


def _shapes_of(model: nn.Module, shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes by the names of forward; those that it collects in `**kwargs` go under that name."""
    parameters = inspect.signature(model.forward).parameters
    named = {name: value for name, value in shapes.items() if name in parameters}
    rest = {name: value for name, value in shapes.items() if name not in parameters}
    collector = [name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD]
    return {**named, collector[0]: rest} if rest else named


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's warnings from the user: what matters is raised or listed."""
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
