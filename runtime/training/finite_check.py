"""What in a step is not finite: its loss, a gradient, or inputs of its batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.utils.finite import not_finite_values


def not_finite(loss: float, gradients: Mapping[str, torch.Tensor]) -> str:
    """Whether the loss or which gradient is infinite or NaN, in words; empty if none is."""
    if not abs(loss) < float("inf"):
        return f"the loss of this batch is {loss}"
    some = {name: gradient for name, gradient in gradients.items() if gradient.numel()}
    sums = [gradient.sum().float() for gradient in some.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):  # a sum is the fastest test; it may overflow
        return ""
    largest = [torch.linalg.vector_norm(gradient, float("inf")).float() for gradient in some.values()]
    bad = (~torch.stack(largest).isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    what = f"the gradient of {list(some)[bad[0]]!r} is not finite on this batch"
    return what + (f" (nor are {len(bad) - 1} others)" if len(bad) > 1 else "")


def suspects(batch: Mapping[str, torch.Tensor]) -> str:
    """The inputs of a batch that are not finite, or what else to look for.

    Those inputs alone are no error: an additive mask holds -inf.
    """
    found = not_finite_values(batch)
    if found:
        return f"inputs that are not finite: {found}"
    return "all inputs are finite: look for a division by zero or an overflow, or train with a lower rate"
