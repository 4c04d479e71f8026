"""Gradients of all outputs of a model or a program, and how far two sets of them are apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from bmgraph.distributed.process_group import Ranks
from bmgraph.ir.eval_form import zero_dropout
from bmgraph.ir.program import Program

ZERO_SHARE = 1e-3
"""The share of the norm of all gradients that is added to a gradient's norm: some true gradients are zero."""

Gradients = dict[str, torch.Tensor]

GradientMap = Callable[[Mapping[str, torch.Tensor]], "torch.Tensor | None"]
"""The gradient of a parameter after a pass, by those of all parameters before it; None where they do not tell."""


def output_gradients(program: Program, batch: Mapping[str, torch.Tensor], names: Sequence[str]) -> Gradients:
    """The gradients of the program's training form without dropout, by parameter; see `gradients_of`."""
    copy = program.clone()
    zero_dropout(copy.graph)
    copy.buffers = {name: buffer.clone() for name, buffer in copy.buffers.items()}
    module = copy.module(training=True)
    parameters = {
        name.removeprefix("graph_module."): parameter for name, parameter in module.named_parameters()
    }
    with autograd_on(module):
        outputs = module(*(batch[spec.name] for spec in program.inputs))[: len(program.outputs)]
        return gradients_of(outputs, {name: parameters[name] for name in names if name in parameters}, 1.0)


def gradients_of(
    outputs: Sequence[torch.Tensor],
    parameters: Mapping[str, nn.Parameter],
    scale: float,
    retain: bool = False,
) -> Gradients:
    """The gradients of the floating-point outputs times random cotangents of norm `scale`; those that are None are left out."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for output in outputs:
        if output.is_floating_point():
            cotangent = torch.randn(output.shape, generator=generator)
            cotangent *= scale / cotangent.norm().clamp(min=1e-6)
            pairs.append((output, cotangent.to(output.device, output.dtype)))
    pairs = [(output, cotangent) for output, cotangent in pairs if output.requires_grad]
    if not pairs:
        return {}
    roots, cotangents = zip(*pairs)
    wanted = list(parameters.values())
    found = torch.autograd.grad(roots, wanted, cotangents, retain_graph=retain, allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found) if gradient is not None}


@dataclass(frozen=True)
class Distances:
    """The norms (L2) of expected gradients, and the errors (L2) of found ones, by parameter. A gradient that is missing is zero."""

    norms: dict[str, float]
    errors: dict[str, float]

    @staticmethod
    def between(found: Gradients, expected: Gradients, names: Sequence[str]) -> Distances:
        """Those of `names`."""
        return Distances(
            {name: _norm(expected[name]) if name in expected else 0.0 for name in names},
            {name: distance(found.get(name), expected.get(name)) for name in names},
        )

    def over(self, ranks: Ranks, device: torch.device) -> Distances:
        """Those of whole gradients, of which each rank has a part (`own_part`). Collective; `device` is the step's."""
        if ranks.size == 1:
            return self
        squares = torch.tensor(
            [[*self.norms.values()], [*self.errors.values()]], dtype=torch.float64
        ).square()
        norms, errors = ranks.sum(squares.to(device)).sqrt().tolist()
        return Distances(dict(zip(self.norms, norms)), dict(zip(self.errors, errors)))

    @property
    def _total(self) -> float:
        return math.sqrt(math.fsum(norm**2 for norm in self.norms.values()))

    def beyond(
        self, tolerance: float, spread: Mapping[str, float] = MappingProxyType({})
    ) -> dict[str, float]:
        """The parameters whose error is too large, with their error relative to the norm; see `differences`."""
        total = self._total
        return {
            name: error / self.norms[name] if self.norms[name] else float("inf")
            for name, error in self.errors.items()
            if not error <= tolerance * (self.norms[name] + ZERO_SHARE * total) + 2 * spread.get(name, 0.0)
        }

    def relative(self) -> dict[str, float]:
        """The error of each gradient, relative to its norm + ZERO_SHARE x the norm of all."""
        total = self._total
        return {
            name: error / max(self.norms[name] + ZERO_SHARE * total, 1e-30)
            for name, error in self.errors.items()
        }


def own_part(gradient: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The part of a whole gradient that a rank keeps, a copy: every n-th element, so that what is wrong on one rank alone is
    seen there. On one rank the gradient itself."""
    return gradient if ranks.size == 1 else gradient.reshape(-1)[ranks.rank :: ranks.size].clone()


def differences(
    found: Gradients, expected: Gradients, names: Sequence[str], tolerance: float, spread: Mapping[str, float]
) -> dict[str, float]:
    """The parameters whose gradients differ, with their error relative to the norm of the expected gradient.

    Allowed is an error (L2) of `tolerance` x (the gradient's norm + ZERO_SHARE x the norm of all gradients), and twice
    the parameter's `spread`. A gradient that is missing is zero.
    """
    return Distances.between(found, expected, names).beyond(tolerance, spread)


def _norm(gradient: torch.Tensor) -> float:
    """The L2 norm of the finite entries."""
    norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    if math.isfinite(norm):
        return norm
    finite = torch.where(gradient.isfinite(), gradient, 0.0)
    return float(torch.linalg.vector_norm(finite, dtype=torch.float64))


def distance(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """The L2 norm of the difference; entries that are both NaN or the same infinity are equal."""
    if found is None or expected is None:
        given = expected if found is None else found
        return 0.0 if given is None else _norm(given)
    gap = float(torch.linalg.vector_norm(found - expected, dtype=torch.float64))
    if math.isfinite(gap):
        return gap
    same = (found == expected) | (found.isnan() & expected.isnan())
    return float(torch.linalg.vector_norm(torch.where(same, 0.0, found - expected), dtype=torch.float64))


@contextmanager
def autograd_on(model: nn.Module) -> Iterator[None]:
    """Autograd is on inside of the block; buffers and the random generators are restored after it."""
    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    devices = {buffer.device for buffer in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        with torch.random.fork_rng(cuda), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
