"""What is measured of a pass that replaces weights: how far the weights move, or how far what they compute moves.

Rounding to the nearest code, and pruning by magnitude, move each weight as little as their format allows: their weights
are bounded. Methods that calibrate (GPTQ, AWQ, SparseGPT) move weights farther so that outputs move less: the outputs of
their sites are bounded, on data (Frantar et al. 2022, arXiv:2210.17323).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers bmgraph::dequantize)
from bmgraph.analysis.interpreter import Observed, evaluate
from bmgraph.analysis.weight_sites import Weight, products, site_value, weight_of
from bmgraph.errors import VerificationError
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, dequantize_blocks
from bmgraph.utils.stored_tensor import in_memory, row_blocks
from bmgraph.verify.metrics import relative_error
from bmgraph.verify.nearest_codes import LEAST_USED, SLACK, block_codes_of, check_block_codes
from bmgraph.verify.site_outputs import SiteOutputErrors

Batch = Mapping[str, torch.Tensor]
Replaced = tuple[str, fx.Node]
"""A site and a node that stands for its weight after the pass."""


@dataclass(frozen=True)
class Measure(ABC):
    """What a pass that replaces weights is held to, beside that all else stays exact: `bound` is a relative L2 error.

    `clips`: static scales may leave out values of activations, which the drift of outputs bounds. `biases`: those of the sites may
    change, too.
    """

    bound: float
    clips: bool = False
    biases: bool = False
    needs_batches: ClassVar[bool] = False
    """Whether the program has to run."""

    @abstractmethod
    def check(
        self, before: Program, after: Program, replaced: Sequence[Replaced], batches: Sequence[Batch]
    ) -> None:
        """Raise VerificationError, which names the site, where a replaced weight breaks the bound.

        The nodes in `replaced` are those of `after`; `batches` are inputs of `before`.
        """


@dataclass(frozen=True)
class WeightsMoved(Measure):
    """For passes that round or mask: each weight, as a whole and per output channel, stays within the bound of the old one.

    Codes must be the nearest to the old weight, at scales that its largest values fill, or `span` of them at least.
    """

    span: float = 1.0

    def check(
        self, before: Program, after: Program, replaced: Sequence[Replaced], batches: Sequence[Batch]
    ) -> None:
        """Compare every weight with the one that it replaces."""
        for site, node in replaced:
            old = site_value(before, site)
            blocks = block_codes_of(node)
            if node.target is torch.ops.bmgraph.dequantize.default:
                self._check_rounded(after, site, node, old)
            elif blocks is not None:
                self._check_blocks(after, site, blocks, old if blocks is node else in_memory(old).T)
            else:
                check_weight(site, evaluate(after, node), in_memory(old), self.bound, _scaled_axis(node))

    def _check_rounded(self, program: Program, site: str, node: fx.Node, old: torch.Tensor) -> None:
        """Compare codes with the weight, a block of rows at a time where each has a scale of its own.

        (A weight whose channels are all within the bound is within it as a whole.)
        """
        axis = _scaled_axis(node)
        assert axis is not None
        codes, scale = (in_memory(evaluate(program, item)) for item in node.args[:2])  # type: ignore[arg-type]
        by_row = axis == 0 and codes.dim() == 2 and codes.shape == old.shape
        for first, block in row_blocks(old) if by_row else [(0, in_memory(old))]:
            rows = slice(first, first + len(block))
            rounded, step = (codes[rows], scale[rows]) if by_row else (codes, scale)
            new = torch.ops.bmgraph.dequantize(rounded, step, axis)
            check_weight(site, new, block, self.bound, axis, first)
            _check_codes(site, rounded, step, axis, block, first, self.span)

    def _check_blocks(self, program: Program, site: str, node: fx.Node, old: torch.Tensor) -> None:
        """Compare codes of blocks, as `node` reads them, with the weight f[N, K], some rows at a time."""
        given = block_arguments(node)
        bits, columns = given.bits, given.columns
        codes, scale, *zeros = (in_memory(evaluate(program, item)) for item in given.readers)
        shape = [*codes.shape[:-2], columns]
        if shape != list(old.shape):
            raise VerificationError(
                f"{site}: the shape of its weight changed from {list(old.shape)} to {shape}"
            )
        if old.dim() == 3:  # experts, one after the other
            old, codes, scale = in_memory(old).flatten(0, 1), codes.flatten(0, 1), scale.flatten(0, 1)
            zeros = [item.flatten(0, 1) for item in zeros]
        for first, block in row_blocks(old):
            rows = slice(first, first + len(block))
            zero = zeros[0][rows] if zeros else None
            new = dequantize_blocks(codes[rows], scale[rows], bits, columns, zero)
            check_weight(site, new, block, self.bound, 0, first)
            check_block_codes(site, codes[rows], scale[rows], zero, bits, block, first, self.span)


@dataclass(frozen=True)
class OutputsMoved(Measure):
    """For passes that calibrate: the outputs of each site's products stay within the bound, on the batches compared.

    Those are the first calibration batch, where there is one, and a resized copy of it. A replaced weight that no product
    reads (an embedding's) is held to the bound by its own values.
    """

    needs_batches: ClassVar[bool] = True

    def check(
        self, before: Program, after: Program, replaced: Sequence[Replaced], batches: Sequence[Batch]
    ) -> None:
        """Run the program before the pass, and compare the outputs of each product with both weights."""
        new = {node.name: weight_of(after, node) for node in products(after.graph)}
        sites = {site for site, _ in replaced}
        readers = [
            (node, weight)
            for node in products(before.graph)
            if (weight := weight_of(before, node)) is not None and weight.site in sites
        ]

        def replace(
            product: fx.Node, weight: Weight, x: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            now = new.get(product.name)
            if now is None:
                raise VerificationError(f"{weight.site}: {product.name} no longer multiplies by its weight")
            return x, _of_shape(weight.site, evaluate(after, now.node), value)

        outputs = SiteOutputErrors(before, readers, replace)
        observed = Observed(before)
        known = {spec.name for spec in before.inputs}
        for batch in batches:
            observed.run({name: batch[name] for name in batch if name in known}, outputs.names, outputs.visit)
        multiplied = {weight.node for weight in new.values() if weight is not None}
        for site, node in replaced:
            if node not in multiplied or site not in outputs.errors:
                old = site_value(before, site)
                moved = relative_error(_of_shape(site, evaluate(after, node), old), old)
                outputs.errors[site] = max(outputs.errors.get(site, 0.0), moved)
        for site, error in outputs.errors.items():
            if not error <= self.bound:
                raise VerificationError(
                    f"{site}: its output changed by {error:.3f} (relative) on the batches compared, more than {self.bound:g}"
                )


def _of_shape(site: str, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """A new weight; raises VerificationError if its shape is not that of the old one."""
    if new.shape != old.shape:
        raise VerificationError(
            f"{site}: the shape of its weight changed from {list(old.shape)} to {list(new.shape)}"
        )
    return new


def _check_codes(
    site: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    axis: int,
    old: torch.Tensor,
    first: int,
    span: float,
) -> None:
    """Raise VerificationError unless codes are the nearest to the old weight, at scales that its largest values fill.

    Where a pass clips more than `span` allows, or shifts codes by what it measured, it must not call itself rounding. `first`
    is the number of the first channel.
    """
    reduced = 1 - axis if codes.dim() == 2 else 3 - axis
    step, wide = scale.unsqueeze(reduced).double(), old.double()
    floats = codes.dtype.is_floating_point
    top = int(torch.finfo(codes.dtype).max) if floats else torch.iinfo(codes.dtype).max
    slack = SLACK + top * torch.finfo(scale.dtype).eps
    if span < 1:
        if bool((wide.abs() > (top / span + slack) * step).any()):
            raise VerificationError(f"{site}: a value is farther beyond its codes than {1 / span:g} times")
        wide = torch.minimum(torch.maximum(wide, -top * step), top * step)
    error = torch.addcmul(wide, step, codes.double(), value=-1).abs_()
    nearest: torch.Tensor | float = 0.5
    if floats:
        best = (wide / step).clamp(-top, top).to(codes.dtype).double()
        nearest = torch.addcmul(wide, step, best, value=-1).abs_() / step
    if bool((error > (nearest + slack) * step).any()):
        raise VerificationError(
            f"{site}: a code is {float((error / step).max()):.2f} scales away from its weight, more than {'the nearest one' if floats else 'half a scale'}"
        )
    largest = wide.abs().amax(reduced, keepdim=True)
    used = torch.where(largest > 0, largest / step, float(top))
    if float(used.min()) < LEAST_USED * top:
        raise VerificationError(
            f"{site}: channel {first + int(used.argmin())} uses codes up to {float(used.min()):.1f} of "
            f"{top}: its scale is too large"
        )


def _scaled_axis(node: fx.Node) -> int | None:
    """The axis of a weight along which each channel has a scale of its own; None if its expression does not tell."""
    if node.target is not torch.ops.bmgraph.dequantize.default or len(node.args) < 3:
        return None
    axis = node.args[2]
    assert isinstance(axis, int)
    return axis


def check_weight(
    site: str, new: torch.Tensor, old: torch.Tensor, bound: float, axis: int | None, first: int = 0
) -> None:
    """Raise VerificationError if a weight, or one of its channels along `axis`, changed by more than `bound`.

    A channel of zeros must stay zero. `first` is the number of the first channel. Where `axis` is None, it is the one whose
    channels changed less.
    """
    _of_shape(site, new, old)
    if relative_error(new, old) > bound:
        raise VerificationError(
            f"{site}: its weight changed by {relative_error(new, old):.2f} (relative), more than {bound:g}"
        )
    if new.dim() not in (2, 3):
        return
    if axis is not None:
        errors = _channel_errors(new, old, 1 - axis if new.dim() == 2 else 3 - axis)
    else:
        errors = min(
            (_channel_errors(new, old, dim) for dim in (-1, -2)), key=lambda found: float(found.max())
        )
    if not float(errors.max()) <= bound:
        raise VerificationError(
            f"{site}: channel {first + int(errors.argmax())} of its weight changed by {float(errors.max()):.2f} "
            f"(relative), more than {bound:g}"
        )


def _channel_errors(new: torch.Tensor, old: torch.Tensor, dim: int) -> torch.Tensor:
    """The relative error of each channel, whose values lie along `dim`."""
    moved, norms = (
        torch.linalg.vector_norm(values, dim=dim, dtype=torch.float64) for values in (new - old, old)
    )
    errors: torch.Tensor = moved / norms.clamp(min=1e-30)
    return errors
