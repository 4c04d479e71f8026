"""A product with the weights of chosen experts: what mixtures, native and made, are built of.

A feed-forward of experts is `experts_linear`, an activation, `experts_linear`, and a sum over the choice; a gated one has
two of them in front of its product. What nobody chose is not computed.

Shapes: T any leading sizes, K experts chosen for each token, E experts in all, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


@torch.library.custom_op("bmgraph::experts_linear", mutates_args=())
def experts_linear(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x f[T, I], the same for all that a token chose, or f[T, K, I], one for each; weight f[E, O, I], ids i64[T, K],
    bias f[E, O] or none -> f[T, K, O]: `x @ weight[id].T + bias[id]` for each id."""
    made = x.new_empty(*ids.shape, weight.shape[1])
    rows = made.reshape(-1, weight.shape[1])
    inputs, shared = _rows(x, ids)
    for expert, places in _choices(ids):
        chosen = inputs[places // ids.shape[-1] if shared else places]
        rows[places] = torch.nn.functional.linear(
            chosen, weight[expert], None if bias is None else bias[expert]
        )
    return made


@experts_linear.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return x.new_empty(*ids.shape, weight.shape[1])


ZERO = 128
"""The code of 0 in u8 weights."""


@torch.library.custom_op("bmgraph::experts_linear_blocks", mutates_args=())
def experts_linear_blocks(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    features: int,
    rounded: bool,
) -> torch.Tensor:
    """`experts_linear` of as many `features` I, with codes u8[E, O, I / S, S] around ZERO, the last block filled up, and a
    scale for each block, f[E, O * (I / S)]; where `rounded`, of x rounded by blocks of S."""
    weight = (codes.to(x.dtype) - ZERO) * scale.reshape(*codes.shape[:3], 1)
    entering = torch.ops.bmgraph.quantize_blocks(x, codes.shape[3]) if rounded else x
    made: torch.Tensor = experts_linear(entering, weight.flatten(2)[..., :features], ids, bias)
    return made


@experts_linear_blocks.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None,
    features: int,
    rounded: bool,
) -> torch.Tensor:
    return x.new_empty(*ids.shape, codes.shape[1])


@torch.library.custom_op("bmgraph::experts_linear_rounded", mutates_args=())
def experts_linear_rounded(
    x: torch.Tensor,
    step: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`experts_linear` with codes i8[E, O, I] and scales f[E, O], of x rounded as `quantize_static` does with step f[] and
    its zero point, without them as `quantize_dynamic` does."""
    ours = torch.ops.bmgraph
    rounded = ours.quantize_dynamic(x) if step is None else ours.quantize_static(x, step, zero_point)
    made: torch.Tensor = experts_linear(rounded, codes.to(x.dtype) * scale.unsqueeze(-1), ids, bias)
    return made


@experts_linear_rounded.register_fake
def _(
    x: torch.Tensor,
    step: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    codes: torch.Tensor,
    scale: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty(*ids.shape, codes.shape[1])


@torch.library.custom_op("bmgraph::experts_outer", mutates_args=())
def experts_outer(gradient: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    """gradient f[T, K, O], x as `experts_linear` takes it, ids i64[T, K] -> f[E, O, I]: the gradient of the weight of each
    of `count` experts, zero for one that nobody chose."""
    made = x.new_zeros(count, gradient.shape[-1], x.shape[-1])
    rows = gradient.reshape(-1, gradient.shape[-1])
    inputs, shared = _rows(x, ids)
    for expert, places in _choices(ids):
        made[expert] = rows[places].T @ inputs[places // ids.shape[-1] if shared else places]
    return made


@experts_outer.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    return x.new_empty(count, gradient.shape[-1], x.shape[-1])


def is_shared(x: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether all experts of a token read the same input."""
    return x.dim() == ids.dim()


def _rows(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, bool]:
    return x.reshape(-1, x.shape[-1]), is_shared(x, ids)


def _choices(ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that was chosen, and the places of the flattened ids that chose it."""
    flat = ids.reshape(-1)
    order, start = flat.argsort(stable=True), 0
    for expert, count in enumerate(torch.bincount(flat).tolist()):
        if count:
            yield expert, order[start : start + count]
        start += count


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, ids, bias = inputs
    ctx.save_for_backward(x, weight, ids)
    ctx.biased = bias is not None


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, ids = ctx.saved_tensors
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.bmgraph.experts_linear(gradient, weight.transpose(1, 2), ids)
        of_x = of_x.sum(-2) if is_shared(x, ids) else of_x
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.bmgraph.experts_outer(gradient, x, ids, weight.shape[0])
    if ctx.biased and ctx.needs_input_grad[3]:
        zeros = gradient.new_zeros(weight.shape[0], weight.shape[1])
        of_bias = zeros.index_add(0, ids.reshape(-1), gradient.reshape(-1, weight.shape[1]))
    return of_x, of_weight, None, of_bias


experts_linear.register_autograd(_gradients, setup_context=_keep)
