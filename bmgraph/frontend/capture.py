"""Capture a PyTorch model as a Program: the entry point, and which exports it tries."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bmgraph.analysis.computation_lines import computation_of
from bmgraph.errors import CaptureError
from bmgraph.frontend.as_found import left_as_found, set_training, training_modes
from bmgraph.frontend.backward_check import prove_backward
from bmgraph.frontend.dynamic_dims import constrained_axes
from bmgraph.frontend.eager_check import Mismatch, ProgramRuns, check_eval_form, check_training_form
from bmgraph.frontend.equal_dims import name_equal_dims, tie_equal_dims, with_suggested_bounds
from bmgraph.frontend.eval_state import refuse_eval_state
from bmgraph.frontend.experts_implementation import exportable_experts
from bmgraph.frontend.fast_path import no_fast_path
from bmgraph.frontend.fixed_sizes import FIXED_AT, fixing_lines, warn_of_fixed_sizes
from bmgraph.frontend.generation_config import generation_defaults
from bmgraph.frontend.import_exported import import_exported
from bmgraph.frontend.kept_weights import (
    own_moving_weights,
    own_statistics,
    weights_as_found,
    weights_through_modes,
)
from bmgraph.frontend.loss_inputs import share_sizes
from bmgraph.frontend.model_inputs import Example, forward_by_name, split_example
from bmgraph.frontend.no_cache import no_cache
from bmgraph.frontend.part_proof import compared_part
from bmgraph.frontend.proof_batches import proof_batches
from bmgraph.frontend.proof_share import WHOLE_PROOF, ProofShare
from bmgraph.frontend.square_example import free_sizes, is_square, unequal_example
from bmgraph.frontend.unregistered import unregistered_parameters
from bmgraph.frontend.unwrap import compiled_parts_as_written, unwrapped
from bmgraph.frontend.weights_folder import FolderWeights, open_weights, placed_weights
from bmgraph.ir.program import Program, placeholders
from bmgraph.ir.shared_weights import shared_weights
from bmgraph.utils.collecting import old_objects_kept
from bmgraph.utils.finite import is_finite
from bmgraph.utils.user_frame import explain

__all__ = ["Example", "capture"]

_EVERY_AXIS, _BATCH_AXIS, _NO_AXIS = range(16), range(1), range(0)
"""Which axes of the inputs may have dynamic sizes."""

Prove = bool | Literal["training"]
"""Whether a program is compared with the eager model; "training": one backward too."""


@dataclass(frozen=True)
class _Proof:
    """How a program is compared with the model, and with which weights."""

    prove: Prove
    weights: FolderWeights | None
    share: ProofShare


def capture(
    model: nn.Module,
    example: Example,
    *,
    dynamic: bool = True,
    prove: Prove = True,
    unread: Collection[str] = (),
    weights: str | Path | None = None,
    share: ProofShare = WHOLE_PROOF,
    memory: int | None = None,
) -> Program:
    """Capture a model as a Program.

    `example` holds the inputs of `forward`: a dict by name, or a tuple in order. Values that are not tensors (flags)
    become constants of the program. With `dynamic`, every axis that the model allows has a dynamic size;
    `program.fixed` lists the batch and sequence axes that do not, and a warning tells those of which the model takes
    other sizes (`program.narrower`). A batch of 1 is repeated to 2, because export
    would fix its size; of an example with equally long axes an element is left out where the model takes that, because
    export would tie them. In training form, modules that are in `eval()` stay so, unless the whole model is. With
    `prove`, the eval form and the training form are compared with the eager model, on the example and on a batch of
    other sizes and values (never on the `meta` device). With `prove="training"`, one backward is compared too: a
    program whose gradients are not the model's (a `torch.autograd.Function`, a gradient hook) cannot train and says
    where (`program.training`); `program.backward` says what was compared. Wrappers (torch.compile, data parallelism,
    PEFT) are looked through. `unread` names tensors of the example that forward does not take, and that the program has
    as inputs for a loss function to read; as a dict it also names, for each, an input whose sizes it has, or "". The model is left as it was found.

    `weights` is a Hugging Face folder of safetensors files for a model on the `meta` device, whose weights stay in these
    files: they are read when asked. Where they fit in memory the program is compared with the model as ever; else by its
    first layers, where the others make the same calls, or not, as `program.unproven` says. `share` is for ranks that divide
    the proof (`captured_by_ranks`). `memory` is how many bytes of weights may be in memory at a time; by default half of what is free.

    Raises CaptureError if the model cannot be captured; the message says where and what to do.

    Example:
        >>> import torch, bmgraph as bg
        >>> program = bg.capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> list(program.parameters)
        ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module to capture, found a {type(model).__name__}")
    model = unwrapped(model)
    inputs = split_example(model, example, unread)
    found = None if weights is None else open_weights(model, Path(weights), prove == "training", memory)
    tensors = inputs.tensors if found is None else found.inputs(inputs.tensors)
    with (
        old_objects_kept(model.parameters()),
        placed_weights(model, found),
        weights_through_modes(model) as writes,
        left_as_found(model),
        compiled_parts_as_written(model),
        no_cache(model),
        no_fast_path(),
    ):
        _check_weights(model)
        modes = training_modes(model)
        model.forward = forward_by_name(model, inputs)
        proof = _Proof(prove, found, share)
        program = _capture_best(model, modes, tensors, dynamic, proof)
        if is_square(program):
            program = _capture_unequal(program, model, modes, tensors, proof)
        refuse_eval_state(program, model)
        if dynamic:
            warn_of_fixed_sizes(program, model, stacklevel=2)
        own_moving_weights(program, writes)
        own_statistics(program)
        program.generation = generation_defaults(model)
        program.computation = computation_of(program)
        if isinstance(unread, Mapping):
            share_sizes(program, unread)
    if found is None:
        program.shared = shared_weights(program.parameters, model)
    else:
        found.give(program)
    return program


def _check_weights(model: nn.Module) -> None:
    """Raise CaptureError if a parameter holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not is_finite(parameter):
            raise CaptureError(
                f"parameter {name!r} holds NaN or infinity: load valid weights before capturing"
            )


def _capture_best(
    model: nn.Module,
    modes: dict[nn.Module, bool],
    tensors: dict[str, torch.Tensor],
    dynamic: bool,
    proof: _Proof,
) -> Program:
    """Capture with as many dynamic sizes as the model takes, proven at other sizes."""
    if proof.weights is None and any(parameter.device.type == "meta" for parameter in model.parameters()):
        proof = replace(proof, prove=False)
    mismatch: Mismatch | None = None
    for axes in (_EVERY_AXIS, _BATCH_AXIS, _NO_AXIS) if dynamic else (_NO_AXIS,):
        program, mismatch = _capture_form(model, modes, tensors, axes, proof)
        if mismatch is None:
            return program
        if mismatch.on_example:
            break
        # the trace holds for some sizes only: leave fewer of them dynamic
    assert mismatch is not None
    raise CaptureError(f"the captured program differs from the model: {mismatch.reason}; {mismatch.advice}")


def _capture_unequal(
    program: Program,
    model: nn.Module,
    modes: dict[nn.Module, bool],
    tensors: dict[str, torch.Tensor],
    proof: _Proof,
) -> Program:
    """Capture again with other shapes than an example whose axes are equally long, if the model does not need them so."""
    unequal = unequal_example(program, model, tensors)
    if unequal is None:
        return program
    try:
        found = _capture_best(model, modes, unequal, True, proof)
    except CaptureError:
        return program
    worse = free_sizes(found) <= free_sizes(program) or (found.training and not program.training)
    return program if worse else found


def _capture_form(
    model: nn.Module,
    modes: dict[nn.Module, bool],
    tensors: dict[str, torch.Tensor],
    axes: range,
    proof: _Proof,
) -> tuple[Program, Mismatch | None]:
    """Capture in training mode; if a form differs from eager, capture in eval mode, which cannot train.

    Returns the program with the mismatch that is left in its eval form.
    """
    try:
        set_training(model, modes)
        program = _export(model, tensors, axes)
        hidden = unregistered_parameters(program, model)
        if hidden:
            raise CaptureError(
                f"{', '.join(hidden)} would stay constant, because the model does not register it: keep it in a "
                "torch.nn.ParameterList or ParameterDict"
            )
        if not proof.prove:
            return program, None
        mismatch = _compared(program, model, modes, proof)
        if mismatch is None or not mismatch.on_example:
            return program, mismatch
        reason = mismatch.reason
    except CaptureError as error:
        reason = f"capture in training mode failed: {error}"
    model.eval()
    program = _export(model, tensors, axes)
    program.training = reason
    if not proof.prove:
        return program, None
    with compared_part(program, model, proof.weights) as part:
        found = None
        if part is not None:
            found = check_eval_form(part, model, proof_batches(part), share=proof.share)
        return program, _of_part(found, part is not program)


def _compared(
    program: Program,
    model: nn.Module,
    modes: dict[nn.Module, bool],
    proof: _Proof,
) -> Mismatch | None:
    """The first mismatch of a program in its eval form, or of its training form, which is taken to be on the example."""
    share = proof.share
    with compared_part(program, model, proof.weights) as part:
        if part is None:
            return None
        batches, runs = proof_batches(part), ProgramRuns(part, keeps=share == WHOLE_PROOF)
        mismatch = check_eval_form(part, model, batches, runs, share)
        if mismatch is not None and not mismatch.on_example:
            return _of_part(mismatch, part is not program)
        mismatch = mismatch or check_training_form(part, model, modes, batches, runs, share)
        if mismatch is not None:
            return _of_part(replace(mismatch, on_example=True), part is not program)
        del runs  # and the outputs that it keeps
        if proof.prove == "training":
            set_training(model, modes)
            with weights_as_found(model), left_as_found(model):
                prove_backward(part, model, batches, share)
        return None


def _of_part(mismatch: Mismatch | None, cut: bool) -> Mismatch | None:
    """A mismatch, with other advice where only the first layers were compared, which may be another model."""
    if mismatch is None or not cut:
        return mismatch
    return replace(
        mismatch,
        reason=f"{mismatch.reason}, where both are cut to their first layers",
        advice="if forward counts its layers, capture it with prove=False; else please report it",
    )


def _export(model: nn.Module, tensors: dict[str, torch.Tensor], axes: range) -> Program:
    """Export with as many dynamic sizes as the model allows, among the first `axes` of each input."""
    tried: list[Program | None] = []

    def shared_dims() -> Program | None:
        """The export with shared dimensions, made once."""
        if not tried:
            tried.append(_export_shared_dims(model, tensors) if axes == _EVERY_AXIS else None)
        return tried[0]

    program = _export_independent_dims(model, tensors, axes, shared_dims)
    shared = shared_dims() if program.fixed else None
    return shared if shared and len(shared.fixed) < len(program.fixed) else program


def _export_shared_dims(model: nn.Module, tensors: dict[str, torch.Tensor]) -> Program | None:
    """Export with one dimension for all sizes that are equal in the example; None if the model does not allow it.

    A loss over flattened logits and labels compares products of sizes. Export then fixes dimensions that are declared
    independent, but keeps shared ones dynamic.
    """
    shapes = name_equal_dims(tensors)
    while shapes:
        try:
            exported = _run_export(model, tensors, shapes)
            return None if _constrained(exported, tensors) else import_exported(model, exported, tensors)
        except Exception as error:  # torch.export raises many types; one of them suggests bounds
            shapes = with_suggested_bounds(shapes, str(error))
    return None


def _export_independent_dims(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    axes: range,
    shared_dims: Callable[[], Program | None],
) -> Program:
    """Export with as many dynamic axes as the model allows, each of its own size.

    Where that would fix some, and `shared_dims` fixes none, the result is that of `shared_dims`: exports take long.
    """
    failure: Exception | None = None
    lines: dict[tuple[str, int], str] = {}
    attempts = [
        {name: set(range(tensor.dim())) & set(some) for name, tensor in tensors.items()}
        for some in (_EVERY_AXIS, _BATCH_AXIS, _NO_AXIS)
        if len(some) <= len(axes)
    ]
    while attempts:
        tried = attempts.pop(0)
        shapes = {name: dict.fromkeys(tried[name], torch.export.Dim.AUTO) or None for name in tensors}
        try:
            exported = _run_export(model, tensors, shapes)
            lines = fixing_lines(exported) | lines
            constrained = _constrained(exported, tensors)
            if constrained and axes == _EVERY_AXIS and tie_equal_dims(exported, tensors):
                constrained = _constrained(exported, tensors)
            if constrained:
                shared = shared_dims()
                if shared is not None and not shared.fixed:
                    return shared
                attempts.insert(
                    0, {name: kept - constrained.get(name, set()) for name, kept in tried.items()}
                )
                continue
            program = import_exported(model, exported, tensors)
            for (name, axis), line in lines.items():
                placeholders(program.graph)[name].meta.setdefault(FIXED_AT, {})[axis] = line
            return program
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises many types; the first is reported below
            failure = failure or error
    assert failure is not None
    raise CaptureError(explain(failure)) from None  # its text and its causes hold whole graphs


def _run_export(
    model: nn.Module, tensors: dict[str, torch.Tensor], shapes: Mapping[str, Any]
) -> torch.export.ExportedProgram:
    printed, graph = io.StringIO(), ""
    try:
        with _no_export_warnings(), exportable_experts(model), redirect_stderr(printed):
            return torch.export.export(model, (), tensors, dynamic_shapes=dict(shapes), strict=False)
    except Exception as error:  # torch.export raises many types, and prints the graph that some of them hold
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(printed.getvalue().replace(graph, "") if graph else printed.getvalue())


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
