"""Compares a traced step, before any pass has changed it, with autograd: loss, every whole gradient, new values of buffers.

The trace puts a step together of parts (the loss as sum and count, each kind of call traced once, forms in half precision);
here the program itself runs, with the loss as the user gave it, and autograd differentiates that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bmgraph.errors import InputError, VerificationError
from bmgraph.ir.eval_form import set_device, zero_dropout
from bmgraph.ir.evaluation import GraphRunner
from bmgraph.ir.program import Program, copy_graph, tensor_nodes
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.ops.traits import is_random
from bmgraph.training.executor import written_in_place
from bmgraph.training.fp32_form import in_fp32
from bmgraph.training.half_form import in_half
from bmgraph.training.loss_terms import Loss
from bmgraph.training.precision import SCALE
from bmgraph.training.step_program import StepProgram
from bmgraph.utils.stored_tensor import in_memory
from bmgraph.verify.gradients import Distances, Gradients, differences, distance
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.step_check import GRADIENT_TOLERANCE, LOSS_TOLERANCE, MEMORY_LIMIT, SEED, rounding_of
from bmgraph.verify.step_run import Batch, is_dropout, shortened, why_not_run, without_dropout, wrong_dropout

LONGEST = 8
"""The size of free axes of the batch that is compared."""

LAST_BITS = 4.0
"""By so many units of its last bit each weight is moved, to see how far rounding alone moves a gradient."""

MOVES = 3
"""So often; of a gradient that is nothing but rounding one may by chance say too little."""

LOSS_SCALE = 256.0
"""The loss scale of a step in float16."""

FAULT = "this is a fault in bmgraph: please report it with the model; verify='structure' leaves the comparison out"

RUN_ERRORS = (RuntimeError, IndexError, TypeError, ValueError)


@dataclass
class _Found:
    """The summed loss and its count, whole gradients by parameter, and new values of buffers by name."""

    total: torch.Tensor
    count: torch.Tensor
    gradients: Gradients
    buffers: Mapping[str, torch.Tensor]


def check_trace(step: StepProgram, program: Program, loss: str | Loss) -> str:
    """Compare a step as it was traced of `program` with autograd, both without dropout, on the beginning of its example.

    `loss` as in `trace_step`. Not collective. Returns one line that says what was compared, or why nothing was. Raises
    VerificationError if the loss, a gradient or a buffer differs by more than rounding moves it.
    """
    why = _not_compared(step, program)
    if why:
        return f"trace: not compared with autograd: {why}"
    wrong = wrong_dropout(step)
    if wrong:
        raise VerificationError(f"{wrong} of the traced step does not scale as its dropout does: {FAULT}")
    try:
        found, batch = _traced(step, program.example)
        if isinstance(found, str):
            return f"trace: not compared with autograd: {found}"
        reference = _Reference(step, program, loss, batch, found.count)
        _check(step, found, reference)
    except torch.OutOfMemoryError:
        return "trace: not compared with autograd: out of memory"
    rows = "x".join(map(str, next(iter(batch.values())).shape))
    return f"trace: loss and {len(found.gradients)} gradients equal autograd's, on {rows}"


def _not_compared(step: StepProgram, program: Program) -> str:
    """Why a step is not compared; empty if it is."""
    why = why_not_run(step, program.example, MEMORY_LIMIT)
    if why:
        return why
    if step.gathered:
        return "its loss reads the rows of all ranks"
    drawn = [str(node.target) for node in step.graph.nodes if is_random(node) and not is_dropout(node)]
    return f"it draws random numbers by {drawn[0]}" if drawn else ""


def _traced(step: StepProgram, example: Batch) -> tuple[_Found | str, Batch]:
    """What the step's graph gives on the beginning of the example, or on all of it where that has no finite loss; or why there is
    none."""
    short, why = shortened(step, example, LONGEST), "the loss of the example is not finite, or has no item"
    for batch in (short, example) if short is not example else (example,):
        try:
            found = _run(step, batch)
        except (*RUN_ERRORS, InputError) as error:  # a label may point behind the end of a short batch
            why = f"the step does not run on the example: {(str(error).splitlines() or [''])[0][:200]}"
            continue
        if float(found.count) > 0 and math.isfinite(float(found.total)):
            return found, batch
    return why, example


def _run(step: StepProgram, batch: Batch) -> _Found:
    """The step's graph, call by call, without dropout."""
    given = {name: value.to(step.device) for name, value in batch.items()}
    tensors = dict(step.tensors)
    written = {name: tensors[name].clone() for name in written_in_place(step)}
    tensors |= written
    if SCALE in tensors:
        tensors[SCALE] = torch.full_like(tensors[SCALE], LOSS_SCALE)
    if step.counts is not None:
        tensors |= {name: tensors[name].clone() for name in step.counts.shares}
        step.counts.share(step.counts.count(given, tensors), tensors)
    inputs = [given[spec.name] for spec in step.outline.inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), checked_indices(step.device):
        torch.manual_seed(SEED)
        returned = GraphRunner(without_dropout(step), tensors).run(
            *inputs, *(tensors[name] for name in step.reads())
        )
    total, count, *others = returned
    gradients = dict(zip(step.trained, others))
    return _Found(total, count, gradients, written | dict(zip(step.writes, others[len(step.trained) :])))


class _Reference:
    """A program in the dtypes that a step computes in, and its loss: autograd gives the gradients."""

    def __init__(
        self, step: StepProgram, program: Program, loss: str | Loss, batch: Batch, count: torch.Tensor
    ) -> None:
        form = in_fp32(program)
        if step.compute != torch.float32:
            form = in_half(form, dtype=step.compute, trained=step.trained_parameters)
        self._form, self._loss, self._count = form, loss, count
        self._batch = {name: value.to(step.device) for name, value in batch.items()}
        self._graph = copy_graph(form.graph)
        zero_dropout(self._graph)
        set_device(self._graph, form.device)
        self._read = list(tensor_nodes(self._graph))
        self._eps = torch.finfo(step.compute).eps
        self.names = [name for name in self._read if self._trains(name)]

    def take(self, moved: int | None = None) -> _Found:
        """What autograd gives; `moved`, a seed: with every weight moved at random by some of its last bits."""
        tensors = {name: in_memory(self._form.tensor(name)).detach() for name in self._read}
        tensors |= {name: tensors[name].clone() for name in self._read if name in self._form.buffers}
        if moved is not None:
            generator = torch.Generator().manual_seed(moved)
            tensors |= {name: self._moved(tensors[name], generator) for name in self._read
                        if name in self._form.parameters and tensors[name].is_floating_point()}  # fmt: skip
        wanted = [tensors[name].requires_grad_() for name in self.names]
        cuda = [self._form.device] if self._form.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(SEED)
            with checked_indices(self._form.device):
                inputs = [self._batch[spec.name] for spec in self._form.inputs]
                returned = GraphRunner(self._graph, tensors).run(*inputs)
                total = self._total(returned)
            gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        kept = {name: item for name, item in zip(self.names, gradients) if item is not None}
        buffers = {name: tensors[name] for name in self._read if name in self._form.buffers}
        buffers |= dict(zip(self._form.writes, returned[len(self._form.outputs) :]))
        return _Found(total.detach(), self._count, kept, buffers)

    def _total(self, returned: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The summed loss: a mean, by name, times its count, or what a function gives."""
        outputs = dict(zip((spec.name for spec in self._form.outputs), returned))
        if isinstance(self._loss, str):
            return outputs[self._loss].float() * self._count
        found: Any = self._loss(outputs, self._batch)
        total: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return total

    def _trains(self, name: str) -> bool:
        tensors, frozen = self._form.parameters, self._form.frozen
        return name in tensors and name not in frozen and tensors[name].is_floating_point()

    def _moved(self, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.rand(tensor.shape, generator=generator).to(tensor.device) * 2 - 1
        return (tensor * (1 + LAST_BITS * self._eps * noise)).to(tensor.dtype)


def _check(step: StepProgram, found: _Found, reference: _Reference) -> None:
    """Raise VerificationError where a step differs from autograd by more than rounding."""
    expected = reference.take()
    rounding = rounding_of(step.compute)
    bound, allowed = max(LOSS_TOLERANCE, rounding), max(GRADIENT_TOLERANCE, rounding)
    gradients = {name: value.to(expected.gradients[name].dtype) if name in expected.gradients else value
                 for name, value in found.gradients.items()}  # fmt: skip
    wrong = Distances.between(gradients, expected.gradients, reference.names).beyond(allowed)
    gap = abs(float(found.total) - float(expected.total))
    lost = gap > bound * max(abs(float(expected.total)), 1e-6)
    if wrong or lost:  # rounding alone may move what cancels out, or what decides between two ways
        moved = [reference.take(seed) for seed in range(MOVES)]
        spread = {
            name: max(distance(item.gradients.get(name), expected.gradients.get(name)) for item in moved)
            for name in reference.names
        }
        wrong = differences(gradients, expected.gradients, reference.names, allowed, spread)
        gap -= 2 * max(abs(float(item.total) - float(expected.total)) for item in moved)
        lost = gap > bound * max(abs(float(expected.total)), 1e-6)
    if lost:
        raise VerificationError(
            f"the traced step gives a summed loss of {float(found.total):.6g}, and the program {float(expected.total):.6g}: {FAULT}"
        )
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise VerificationError(
            f"the traced step differs from autograd in {len(wrong)} of {len(reference.names)} gradients, most in that of {worst!r} "
            f"(by {wrong[worst]:.2g} of its norm): {FAULT}"
        )
    for name, value in found.buffers.items():
        other = expected.buffers.get(name)
        if other is not None and not relative_error(value.float(), other.float()) <= allowed:
            raise VerificationError(
                f"the traced step gives buffer {name!r} another value than the program: {FAULT}"
            )
