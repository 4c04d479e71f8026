"""Compare the two forms of a program, eval and training, with the outputs of the eager model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bmgraph.errors import CaptureError
from bmgraph.frontend.as_found import set_training
from bmgraph.frontend.half_precision import rounding_bounds
from bmgraph.frontend.no_dropout import NoDropout
from bmgraph.frontend.own_run import own_run
from bmgraph.frontend.proof_batches import Choices
from bmgraph.frontend.proof_share import WHOLE_PROOF, ProofShare
from bmgraph.frontend.randomness import (
    UNUSUAL_DRAWS,
    HostGenerators,
    random_eval_calls,
    seed_host,
    seed_torch_anew,
)
from bmgraph.ir.eval_form import forms_agree, zero_dropout
from bmgraph.ir.program import Program
from bmgraph.verify.metrics import relative_error

EAGER_TOLERANCE = 1e-4
"""Largest relative L2 error of a program's output against its eager model."""

MODEL_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
)
"""What a model raises on a batch that it does not take."""

_USE_DROPOUT = (
    "random numbers may be drawn in training only, by dropout (torch.nn.Dropout), or by torch's operators under "
    "`if self.training` in a model that is captured for inference"
)

Batch = Mapping[str, torch.Tensor]
Values = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Mismatch:
    """How a program differs from its model."""

    reason: str
    on_example: bool
    """Whether on the example itself; else only at other sizes or values."""
    advice: str = "please report this model's forward"


class ProgramRuns:
    """What a program gives in eval form, by batch; kept where this is what its training form gives without dropout too, so
    that one run is compared with the model in both modes."""

    def __init__(self, program: Program, keeps: bool = True) -> None:
        self._program = program
        self._keeps = keeps and forms_agree(program)
        self._kept: list[tuple[Batch, Values]] = []

    def in_eval(self, batch: Batch) -> Values:
        """The outputs in eval form."""
        found = self._program(**batch)
        if self._keeps:
            self._kept.append((batch, found))
        return found

    def in_training(self, batch: Batch) -> Values | None:
        """The outputs in training form without dropout, if they are known."""
        return next((values for known, values in self._kept if known is batch), None)


def check_eval_form(
    program: Program,
    model: nn.Module,
    batches: Sequence[Choices],
    runs: ProgramRuns | None = None,
    share: ProofShare = WHOLE_PROOF,
) -> Mismatch | None:
    """The first mismatch of the eval form with the model in eval mode, on the example and on `batches` made from it, as far
    as these are in this rank's `share`.

    Batches that the model itself refuses are let pass and recorded in `program.unproven`. Raises CaptureError if the
    model does not run on the example.
    """
    left = random_eval_calls(program)
    if left:
        return Mismatch(f"its eval form still draws random numbers ({left})", True, _USE_DROPOUT)

    def eager(batch: Batch) -> Values:
        model.eval()
        return numbered(model(**batch))

    captured = (runs or ProgramRuns(program)).in_eval
    own = [share.has(2 * index) for index in range(1 + len(batches))]
    return _first_mismatch(program, model, eager, captured, batches, "eval", own)


def check_training_form(
    program: Program,
    model: nn.Module,
    modes: dict[nn.Module, bool],
    batches: Sequence[Choices],
    runs: ProgramRuns,
    share: ProofShare = WHOLE_PROOF,
) -> Mismatch | None:
    """The same for the training form and the model in training mode, both without dropout.

    `modes` are those of the model in training, from `training_modes`; `runs` are those of the eval form. New values of
    buffers are compared, too.
    """
    quiet = program.clone()
    zero_dropout(quiet.graph)
    shared = [name for name, _ in model.named_buffers() if name in program.buffers]

    def eager(batch: Batch) -> Values:
        set_training(model, modes)
        with NoDropout():
            found = numbered(model(**batch))
        return {**found, **{name: item.clone() for name, item in model.named_buffers() if name in shared}}

    def captured(batch: Batch) -> Values:
        known = runs.in_training(batch)
        if known is not None:
            return {**known, **{name: program.buffers[name] for name in shared}}
        quiet.buffers = {name: buffer.clone() for name, buffer in program.buffers.items()}
        values = quiet.module(training=True)(*(batch[spec.name] for spec in program.inputs))
        found = dict(zip((spec.name for spec in program.outputs), values))
        return {**found, **{name: quiet.buffers[name] for name in shared}}

    own = [share.has(2 * index + 1) for index in range(1 + len(batches))]
    return _first_mismatch(program, model, eager, captured, batches, "training", own)


def _first_mismatch(
    program: Program,
    model: nn.Module,
    eager: Callable[[Batch], Values],
    captured: Callable[[Batch], Values],
    batches: Sequence[Choices],
    form: str,
    own: Sequence[bool],
) -> Mismatch | None:
    """The first mismatch on the example, and then on the batches, as far as `own` says that they are compared here."""
    if own[0]:
        mismatch = _mismatch_on_example(program, model, eager, captured, form)
        if mismatch is not None:
            return mismatch
    for choices, is_own in zip(batches, own[1:], strict=True):
        accepted = _accepted(program, model, eager, choices) if is_own else None
        if accepted is None:
            continue
        batch, expected = accepted
        bounds = _bounds(model, eager, batch, expected)
        difference = _difference(_captured_values(captured, batch), expected, bounds)
        if difference:
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
            return Mismatch(
                f"its {form} form differs from eager at other sizes or values ({sizes}) in {difference}",
                False,
            )
    return None


def _mismatch_on_example(
    program: Program,
    model: nn.Module,
    eager: Callable[[Batch], Values],
    captured: Callable[[Batch], Values],
    form: str,
) -> Mismatch | None:
    """How a form differs from the model on the example, or that the model is random there; None if neither."""
    with own_run(model):
        generators = HostGenerators()
        try:
            expected = eager(program.example)
        except MODEL_ERRORS as error:
            raise CaptureError(
                f"the model does not run on the example: {type(error).__name__}: {error}"
            ) from error
        drawn = generators.moved()
    bounds = _bounds(model, eager, program.example, expected)
    difference = _difference(_captured_values(captured, program.example), expected, bounds)
    random = _randomness(model, eager, program.example, expected, drawn, differs=bool(difference))
    if random:
        return Mismatch(f"in {form} mode the model is random: {random}", True, _USE_DROPOUT)
    if difference:
        return Mismatch(f"its {form} form differs from eager in {difference}", on_example=True)
    return None


def _randomness(
    model: nn.Module,
    eager: Callable[[Batch], Values],
    batch: Batch,
    expected: Values,
    drawn: str,
    differs: bool,
) -> str:
    """How the model's outputs depend on random numbers that the program does not draw; empty if they do not.

    `drawn` names the generators of the host that a run has moved: a model may draw in vain, to drop a layer with
    probability 0. Whether the model differs from itself otherwise is asked only where the program `differs`.
    """
    for seeds in UNUSUAL_DRAWS if drawn else ():
        with own_run(model):
            seed_host(*seeds)
            difference = _difference(eager(batch), expected)
        if difference:
            return f"draws from {drawn}, of which a graph would keep one, change {difference}"
    if differs:
        with own_run(model):
            seed_torch_anew()
            difference = _difference(eager(batch), expected)
        if difference:
            return f"two runs on the same inputs differ in {difference}"
    return ""


def _accepted(
    program: Program,
    model: nn.Module,
    eager: Callable[[Batch], Values],
    choices: list[dict[str, torch.Tensor]],
) -> tuple[Batch, Values] | None:
    """The first batch that the model takes, with its outputs; None, recorded in the program, if it takes none."""
    refused = ""
    for batch in choices:
        try:
            with own_run(model):
                return batch, eager(batch)
        except MODEL_ERRORS as error:
            sizes = ", ".join(f"{name} {list(value.shape)}" for name, value in batch.items())
            first = (str(error).splitlines() or [""])[0]
            refused = f"not compared at {sizes}: the model raises {type(error).__name__}: {first[:200]}"
    if refused not in program.unproven:
        program.unproven = (*program.unproven, refused)
    return None


def _captured_values(captured: Callable[[Batch], Values], batch: Batch) -> Values | str:
    """What the program gives, or why it fails."""
    generator = torch.random.get_rng_state()
    try:
        with torch.no_grad():
            return captured(batch)
    except MODEL_ERRORS as error:
        return f"that it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    finally:
        torch.random.set_rng_state(generator)


def _bounds(
    model: nn.Module, eager: Callable[[Batch], Values], batch: Batch, expected: Values
) -> Sequence[float]:
    """The relative error that each value of a program may have: more for a model in half precision."""
    with own_run(model):
        return rounding_bounds(
            model,
            batch,
            list(expected.values()),
            lambda inputs: list(eager(inputs).values()),
            EAGER_TOLERANCE,
        )


def _difference(found: Values | str, expected: Values, bounds: Sequence[float] | None = None) -> str:
    """The first value that differs by more than its bound (EAGER_TOLERANCE), and by how much; empty if none does.

    Values are compared in order.
    """
    if isinstance(found, str):
        return found
    if len(found) != len(expected):
        return f"that it returns {len(found)} tensors where eager returns {len(expected)}"
    for (name, actual), reference, bound in zip(
        found.items(), expected.values(), bounds or [EAGER_TOLERANCE] * len(expected), strict=True
    ):
        error = relative_error(actual, reference)
        if not error <= bound:
            rounding = f", more than half precision rounds ({bound:.1e})" if bound > EAGER_TOLERANCE else ""
            return f"{name} by {error:.1e} (relative){rounding}"
    return ""


def tensor_leaves(result: object) -> list[torch.Tensor]:
    """The tensors in a model's output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def numbered(result: Any) -> Values:
    """Copies of the tensors in a model's output, by their number."""
    return {f"output {index}": leaf.clone() for index, leaf in enumerate(tensor_leaves(result))}
