"""Reference batches and outputs: chooses batches, records a program's outputs, measures drift from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from bmgraph.analysis.attention_mask import zeros_hide
from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.errors import BmgraphError
from bmgraph.ir.categorical_input import fill_categorical
from bmgraph.ir.program import Program, placeholders
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

CUSTOMARY = ("attention_mask", "mask")
"""What a mask of real positions is called in models without attention, which may pool over them."""

Batch = Mapping[str, torch.Tensor]


def padding_mask(program: Program, batch: Batch) -> str | None:
    """The name of the input [batch, sequence] whose ones mark real positions; None if there is none.

    It is an input of zeros and ones named as a mask, whose zeros hide keys in an attention of the program: one that marks
    the padding itself (torch's key_padding_mask), or tokens to predict, would hide real positions from a comparison.
    """
    for spec in program.inputs:
        value = batch.get(spec.name)
        if value is None or "mask" not in spec.name or value.dim() != 2 or value.is_floating_point():
            continue
        if _is_binary(value) and _marks_real_positions(program, spec):
            return spec.name
    return None


def _marks_real_positions(program: Program, spec: TensorSpec) -> bool:
    """Whether an attention hides keys at an input's zeros; where that cannot be told, whether integers reach its scores."""
    cores = walk(program.graph).cores
    found = {
        zeros_hide(program, mask, spec.name) for mask in {core.mask for core in cores} if mask is not None
    }
    if True in found or spec.dtype == torch.bool:
        return True in found
    if not cores:
        return spec.name in CUSTOMARY  # nothing attends, so that only the name can tell
    source = placeholders(program.graph)[spec.name]
    return None in found or any(_reaches_scores(source, core) for core in cores if core.softmax is not None)


def _reaches_scores(source: fx.Node, core: Core) -> bool:
    """Whether a written-out attention reads an input between its scores and its softmax, other than through the scores."""
    seen: set[fx.Node] = {core.scores} if core.scores is not None else set()
    stack = [core.softmax] if core.softmax is not None else []
    while stack:
        item = stack.pop()
        if item is source:
            return True
        if item not in seen:
            seen.add(item)
            stack.extend(item.all_input_nodes)
    return False


def padded_outputs(program: Program, mask: str | None) -> frozenset[str]:
    """The outputs [batch, sequence, ...] whose first two sizes are those of the input `mask`, for all batches.

    Sizes that are only equal in a batch (as many classes as positions) do not count, nor does a fixed length, which cannot
    be told from any other number.
    """
    sizes = next((spec.shape for spec in program.inputs if spec.name == mask), ())
    if len(sizes) != 2 or not isinstance(sizes[1], str) or not (isinstance(sizes[0], str) or sizes[0] == 1):
        return frozenset()
    return frozenset(spec.name for spec in program.outputs if spec.shape[:2] == sizes)


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
    """Batches, and the outputs of a program on them; `mask` names the input that marks real positions in `padded` outputs."""

    batches: list[Batch]
    outputs: list[dict[str, torch.Tensor]]
    mask: str | None = None
    padded: frozenset[str] = frozenset()

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
        mask = padding_mask(program, batch)
        return Reference(batches, outputs, mask, padded_outputs(program, mask))

    def rerun(self, program: Program) -> Reference:
        """Run another program on the same batches; it may have fewer inputs, and others of their floating-point types."""
        read = [fitted(batch, program.inputs) for batch in self.batches]
        return replace(
            self,
            batches=[{**batch, **values} for batch, values in zip(self.batches, read)],
            outputs=[program(**values) for values in read],
        )

    def drift_to(self, other: Reference) -> Drift:
        """The largest drift of the other's outputs from these, without padding."""
        found = [
            drift(theirs, mine, batch[self.mask] if self.mask else None, self.padded)
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
