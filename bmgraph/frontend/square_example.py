"""Other shapes for an example in which two axes of one input are equally long by accident, such as 8 rows of 8 tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice, product

import torch
from torch import nn

from bmgraph.frontend.own_run import own_run
from bmgraph.ir.program import Program
from bmgraph.ir.symbolic_dim import is_name

MOST_TRIED = 32
"""Largest number of shapes that the model is run with."""
LEAST = 3
"""Smallest size that is made smaller: sizes of 1 are special to torch."""

REFUSED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
"""What a model may raise on shapes that do not fit together."""


def is_square(program: Program) -> bool:
    """Whether an input has one dynamic size twice."""
    return bool(_repeated(program))


def free_sizes(program: Program) -> int:
    """The number of sizes that can vary by themselves."""
    return len({dim for spec in program.inputs for dim in spec.shape if is_name(dim)})


def unequal_example(
    program: Program, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    """The example with one element less along some of the axes that share a repeated size; None if the model takes none.

    If an input needs the size twice, such as the length in a bias f[S, S], the model refuses all of them.
    """
    for smaller in islice(_candidates(program, tensors), MOST_TRIED):
        try:
            with own_run(model):
                model.eval()
                model(**smaller)
        except REFUSED:
            continue
        return smaller
    return None


def _repeated(program: Program) -> list[str]:
    return [
        str(dim)
        for spec in program.inputs
        for dim in dict.fromkeys(spec.shape)
        if is_name(dim) and spec.shape.count(dim) > 1
    ]


def _candidates(program: Program, tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """One axis smaller in some of the inputs that have the size, at least in one that has it twice."""
    for name in _repeated(program):
        axes = {
            spec.name: [axis for axis, dim in enumerate(spec.shape) if dim == name] for spec in program.inputs
        }
        held = {key: [*found, None] for key, found in axes.items() if found}
        if any(tensors[key].shape[found[0]] < LEAST for key, found in held.items() if found[0] is not None):
            continue
        for chosen in product(*held.values()):
            if not any(axis is not None and len(axes[key]) > 1 for key, axis in zip(held, chosen)):
                continue
            smaller = dict(tensors)
            for key, axis in zip(held, chosen):
                if axis is not None:
                    smaller[key] = tensors[key].narrow(axis, 0, tensors[key].shape[axis] - 1).contiguous()
            yield smaller
