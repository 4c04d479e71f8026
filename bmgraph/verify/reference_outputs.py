"""Reference batches and outputs: chooses batches, records a program's outputs, measures drift from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from bmgraph.errors import BmgraphError, VerificationError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.symbolic_dim import is_name, size_of
from bmgraph.ir.tensor_spec import TensorSpec, row_sizes
from bmgraph.ops.index_bounds import checked_indices
from bmgraph.verify.metrics import Drift, drift, errors, without_padding
from bmgraph.verify.padding import padded_outputs, padding_mask
from bmgraph.verify.probe_batch import probe_batches

EXACT: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""Dtype of the weights -> largest relative error (L2) of the outputs after an exact pass, from rounding alone."""

Batch = Mapping[str, torch.Tensor]


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
    name = padding_mask(program, resized)
    if name is not None:
        mask = resized[name]
        rows, length = mask.shape
        kept = torch.tensor(
            [max(1, length - row * length // (2 * rows)) for row in range(rows)], device=mask.device
        )
        ragged = (torch.arange(length, device=mask.device)[None] < kept[:, None]).to(mask.dtype)
        resized[name] = ragged
    return resized


def _other_size(program: Program, dim: str, size: int) -> int:
    """Another value of a dynamic size within its range; `size` itself if the range allows no other."""
    bounds = program.ranges.get(dim)
    for candidate in (size + 1 if dim in row_sizes(program.inputs) else size + 3, size - 1):
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
    """Batches, and the outputs of a program on them; `mask` names the input that marks real positions in `padded` outputs.

    The first `measured` batches are like those that the user gave: drift is measured on them. The last may be a probe
    (`probe_batch`), on which what is exact must be exact too.
    """

    batches: list[Batch]
    outputs: list[dict[str, torch.Tensor]]
    measured: int
    mask: str | None = None
    padded: frozenset[str] = frozenset()

    @staticmethod
    def take(program: Program, batch: Batch) -> Reference:
        """Run a program on a batch and, as far as it can, on a resized copy of it and on a probe."""
        batches: list[Batch] = [batch]
        outputs = [program(**batch)]
        resized = other_batch(program, batch)
        _add(program, [] if resized is None else [resized], batches, outputs)
        measured = len(batches)
        _add(program, probe_batches(program, batch), batches, outputs)
        mask = padding_mask(program, batch)
        taken = Reference(batches, outputs, measured, mask, padded_outputs(program, mask))
        taken.check_compared("outputs cannot be compared")
        return taken

    def check_compared(self, what: str) -> None:
        """Raise VerificationError, which begins with `what`, if no value of an output is finite on the first batch, that of
        the user: NaN equals NaN, and nothing would be compared."""
        for batch, outputs in zip(self.batches[:1], self.outputs):
            mask = batch[self.mask] if self.mask else None
            for name, value in outputs.items():
                if not value.is_floating_point():
                    continue
                value, _ = without_padding(name, value, value, mask, self.padded)
                if value.numel() and not bool(value.isfinite().any()):
                    shape = "x".join(map(str, next(iter(batch.values())).shape))
                    raise VerificationError(
                        f"{what}: no value of {name} is finite on the batch of {shape}: give an example or calibration data on "
                        f"which the model gives numbers, or a model of a wider type than {str(value.dtype).removeprefix('torch.')}"
                    )

    def rerun(self, program: Program) -> Reference:
        """Run another program on the same batches; it may have fewer inputs, and others of their floating-point types."""
        read = [fitted(batch, program.inputs) for batch in self.batches]
        return replace(
            self,
            batches=[{**batch, **values} for batch, values in zip(self.batches, read)],
            outputs=[program(**values) for values in read],
        )

    def drift_to(self, other: Reference) -> Drift:
        """The largest drift of the other's outputs from these on the measured batches, without padding."""
        pairs = zip(self.batches[: self.measured], self.outputs, other.outputs)
        drifts = [
            drift(theirs, mine, batch[self.mask] if self.mask else None, self.padded)
            for batch, mine, theirs in pairs
        ]
        return max(drifts, key=lambda item: item.error)

    def errors_to(self, other: Reference) -> list[dict[str, float]]:
        """The relative error of the other's outputs from these on each batch, the probe too, by output, without padding."""
        return [
            errors(theirs, mine, batch[self.mask] if self.mask else None, self.padded)
            for batch, mine, theirs in zip(self.batches, self.outputs, other.outputs)
        ]

    def where(self, kept: Callable[[Batch], bool]) -> Reference:
        """The first batch, and those of the others that are `kept`."""
        places = [place for place, batch in enumerate(self.batches) if not place or kept(batch)]
        return replace(
            self,
            batches=[self.batches[place] for place in places],
            outputs=[self.outputs[place] for place in places],
            measured=sum(place < self.measured for place in places),
        )

    def without_probe(self) -> Reference:
        """The measured batches alone, which is what drift needs."""
        return replace(self, batches=self.batches[: self.measured], outputs=self.outputs[: self.measured])

    def beyond(self, other: Reference, bounds: Mapping[str, float]) -> str:
        """The output of another that is farthest beyond its bound on any batch, in words; empty if none is."""
        worst, text = 1.0, ""
        for batch, mine, theirs in zip(self.batches, self.outputs, other.outputs):
            mask = batch[self.mask] if self.mask else None
            for name, error in errors(theirs, mine, mask, self.padded).items():
                share = error / bounds[name]
                if not share <= worst:
                    shape = "x".join(map(str, next(iter(batch.values())).shape))
                    worst = share
                    text = f"{name} moved by {error:.1e} (relative) on a batch of {shape}, more than rounding ({bounds[name]:.0e})"
        return text

    def describe(self, probe: bool = False) -> str:
        """The shapes of the first input in the batches, for a report: "2x5 and 3x8"; with `probe` in that batch too."""
        batches = self.batches[: None if probe else self.measured]
        return " and ".join("x".join(map(str, next(iter(batch.values())).shape)) for batch in batches)


def _add(
    program: Program, choices: Sequence[Batch], batches: list[Batch], outputs: list[dict[str, torch.Tensor]]
) -> None:
    """Add the first of the choices that the program takes; its model may have conditions beyond the ranges of sizes."""
    for choice in choices:
        try:
            with checked_indices(program.device):
                outputs.append(program(**choice))
        except (BmgraphError, RuntimeError, IndexError):
            continue
        batches.append(choice)
        return


def exact_bounds(program: Program) -> dict[str, float]:
    """Largest relative error (L2) from rounding alone, by output: that of the coarsest type on the way to it."""
    worst: dict[fx.Node, float] = {}
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        kinds = [max((worst[item] for item in node.all_input_nodes), default=0.0)]
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            kinds.append(EXACT.get(value.dtype, EXACT[torch.float32]))
        worst[node] = max(kinds)
    returned: Any = output_node(program.graph).args[0]
    return {
        spec.name: max(worst[node], EXACT[torch.float64]) for spec, node in zip(program.outputs, returned)
    }


def exact_bound(program: Program) -> float:
    """The largest of the bounds of all outputs."""
    return max(exact_bounds(program).values(), default=EXACT[torch.float32])
