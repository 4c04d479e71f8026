"""Stops a step whose loss or gradients are not finite, before anything moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bmgraph.errors import InputError


def check_finite(
    loss: float, gradients: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
) -> None:
    """Raise InputError if the loss or a gradient is infinite or NaN; it names the inputs of the batch that are not finite.

    Those inputs alone are no error: an additive mask holds -inf.
    """
    what = "" if abs(loss) < float("inf") else f"the loss of this batch is {loss}"
    if not what:
        some = {name: gradient for name, gradient in gradients.items() if gradient.numel()}
        largest = [torch.linalg.vector_norm(gradient, float("inf")).float() for gradient in some.values()]
        bad = [] if not largest else (~torch.stack(largest).isfinite()).nonzero().flatten().tolist()
        if not bad:
            return
        what = f"the gradient of {list(some)[bad[0]]!r} is not finite on this batch"
        what += f" (nor are {len(bad) - 1} others)" if len(bad) > 1 else ""
    suspects = []
    for name, value in batch.items():
        count = int((~value.isfinite()).sum()) if value.is_floating_point() else 0
        if count:
            suspects.append(f"{name!r} ({count} of {value.numel()} values)")
    hint = (
        f"inputs that are not finite: {', '.join(suspects)}"
        if suspects
        else "all inputs are finite: look for a division by zero or an overflow, or train with a lower rate"
    )
    raise InputError(f"{what}, so the step was not taken and nothing was changed; {hint}")
