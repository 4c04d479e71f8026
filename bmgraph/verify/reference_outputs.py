"""Reference batches and outputs: chooses batches, records a program's outputs, measures drift from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bmgraph.errors import BmgraphError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program
from bmgraph.ir.symbolic_dim import is_name, size_of
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.verify.metrics import Drift, drift

EXACT: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""Dtype of the weights -> largest relative error (L2) of the outputs after an exact pass, from rounding alone."""

Batch = Mapping[str, torch.Tensor]


def padding_mask(batch: Batch) -> torch.Tensor | None:
    """The input [batch, sequence] of zeros and ones that marks real positions; None if there is none."""
    for name, value in batch.items():
        if "mask" in name and value.dim() == 2 and not value.is_floating_point() and _is_binary(value):
            return value
    return None


def _is_binary(value: torch.Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


def other_batch(
    program: Program, batch: Batch, wanted: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor] | None:
    """A resized copy of a batch with a ragged mask; None if all sizes are fixed or cannot be derived.

    `wanted` gives sizes by name; the others are chosen.
    """
    sizes: dict[str, int] = dict(wanted or {})
    for spec in program.inputs:
        for axis, dim in enumerate(spec.shape):
            if is_name(dim):
                sizes.setdefault(str(dim), _other_size(program, str(dim), batch[spec.name].shape[axis]))
    if not sizes:
        return None
    for dim in {dim for spec in program.inputs for dim in spec.shape if isinstance(dim, str)} - sizes.keys():
        size = size_of(dim, sizes)
        if size is None:
            return None
        sizes[dim] = size
    resized = {}
    for spec in program.inputs:
        value = batch[spec.name]
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                index = torch.arange(sizes[dim], device=value.device) % value.shape[axis]
                value = value.index_select(axis, index.flip(0) if axis == 0 else index)
        resized[spec.name] = value
    mask = padding_mask(resized)
    if mask is not None:
        rows, length = mask.shape
        kept = torch.tensor(
            [max(1, length - row * length // (2 * rows)) for row in range(rows)], device=mask.device
        )
        ragged = torch.arange(length, device=mask.device)[None] < kept[:, None]
        if bool(mask.double().mean() < 0.5):  # a mask of what is padding, such as `key_padding_mask`
            ragged = ~ragged
        ragged = ragged.to(mask.dtype)
        resized = {name: ragged if value is mask else value for name, value in resized.items()}
    return resized


def _other_size(program: Program, dim: str, size: int) -> int:
    """Another value of a dynamic size within its range; `size` itself if the range allows no other."""
    bounds = program.ranges.get(dim)
    for candidate in (size + 1 if dim == "batch" else size + 3, size - 1):
        fits = bounds is None or (
            candidate >= bounds.low and (bounds.high is None or candidate <= bounds.high)
        )
        if fits and candidate >= 1:
            return candidate
    return size


def comparison_batch(program: Program, batches: object) -> Batch:
    """The first calibration batch if it has all inputs, since activations are scaled for such data; else the example.

    Iterators are not read: they could be read only once.
    """
    if isinstance(batches, Mapping):
        batches = [batches]
    if isinstance(batches, Iterable) and iter(batches) is not batches:
        for batch in batches:
            if isinstance(batch, Mapping) and all(
                spec.name in batch or spec.names for spec in program.inputs
            ):
                return fill_categorical(program.inputs, batch)
            break
    return program.example


def fitted(batch: Batch, inputs: Sequence[TensorSpec]) -> dict[str, torch.Tensor]:
    """The values of a batch that are among the inputs; floating-point values in the type of their input."""
    known = {spec.name: spec.dtype for spec in inputs}
    return {
        name: value.to(known[name]) if value.is_floating_point() and known[name].is_floating_point else value
        for name, value in batch.items()
        if name in known
    }


@dataclass
class Reference:
    """Batches, and the outputs of a program on them."""

    batches: list[Batch]
    outputs: list[dict[str, torch.Tensor]]

    @staticmethod
    def take(program: Program, batch: Batch) -> Reference:
        """Run a program on a batch and, if it can, on a resized copy of it."""
        batches: list[Batch] = [batch]
        outputs = [program(**batch)]
        resized = other_batch(program, batch)
        if resized is not None:
            try:
                outputs.append(program(**resized))
                batches.append(resized)
            except (BmgraphError, RuntimeError, IndexError):
                pass  # the model has conditions on its sizes beyond their ranges
        return Reference(batches, outputs)

    def rerun(self, program: Program) -> Reference:
        """Run another program on the same batches; it may have fewer inputs, and others of their floating-point types."""
        read = [fitted(batch, program.inputs) for batch in self.batches]
        return Reference(
            [{**batch, **values} for batch, values in zip(self.batches, read)],
            [program(**values) for values in read],
        )

    def drift_to(self, other: Reference) -> Drift:
        """The largest drift of the other's outputs from these, without padding."""
        found = [
            drift(theirs, mine, padding_mask(batch))
            for batch, mine, theirs in zip(self.batches, self.outputs, other.outputs)
        ]
        return max(found, key=lambda item: item.error)

    def describe(self) -> str:
        """The shapes of the first input in all batches, for a report: "2x5 and 3x8"."""
        return " and ".join("x".join(map(str, next(iter(batch.values())).shape)) for batch in self.batches)


def exact_bound(program: Program) -> float:
    """Largest relative error (L2) of the outputs from rounding alone, by the dtypes of the weights."""
    kinds = {tensor.dtype for tensor in program.parameters.values() if tensor.is_floating_point()}
    return max((EXACT[kind] for kind in kinds if kind in EXACT), default=EXACT[torch.float32])
