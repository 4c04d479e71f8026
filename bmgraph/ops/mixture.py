"""A feed-forward of chosen experts as inference kernels take it: in one call, with experts' outputs summed.

Shapes as in `bmgraph.ops.experts`: T tokens, K chosen, E experts, I inputs, S neurons, D outputs; the first product gives
O = S, or O = 2 S for "swiglu", whose rows go gate, up, gate, up, ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bmgraph.ops.experts import ZERO

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "swiglu": lambda x: torch.nn.functional.silu(x[..., ::2]) * x[..., 1::2],
}
"""What stands between the products, by the name that kernels know it by."""


@torch.library.custom_op("bmgraph::mixture", mutates_args=())
def mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """x f[T, I], ids i64[T, K], first f[E, O, I], first_bias f[E, O] or none, second f[E, D, S] -> f[T, D]."""
    hidden = torch.ops.bmgraph.experts_linear(x, first, ids, first_bias)
    made: torch.Tensor = torch.ops.bmgraph.experts_linear(ACTIVATIONS[activation](hidden), second, ids)
    return made.sum(-2)


@mixture.register_fake
def _(
    x: torch.Tensor,
    ids: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], second.shape[1])


@torch.library.custom_op("bmgraph::mixture_int8", mutates_args=())
def mixture_int8(
    x: torch.Tensor,
    scores: torch.Tensor,
    active: int,
    first: torch.Tensor,
    first_scale: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    second_scale: torch.Tensor,
    activation: str,
    block: int,
) -> torch.Tensor:
    """As `mixture` for the `active` experts of the highest scores f[T, E], with codes u8 around ZERO and scales f[E, O]
    and f[E, D]; with a `block` the scales are repeated for every so many inputs, f[E, O, I / block], and what enters the
    products is rounded by those blocks."""

    def weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = scale.repeat_interleave(block, 2) if block else scale.unsqueeze(-1)
        return (codes.to(x.dtype) - ZERO) * steps

    def entering(value: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = torch.ops.bmgraph.quantize_blocks(value, block) if block else value
        return rounded

    experts_linear, ids = torch.ops.bmgraph.experts_linear, scores.topk(active).indices
    hidden = experts_linear(entering(x), weight(first, first_scale), ids, first_bias)
    hidden = entering(ACTIVATIONS[activation](hidden))
    made: torch.Tensor = experts_linear(hidden, weight(second, second_scale), ids).sum(-2)
    return made


@mixture_int8.register_fake
def _(
    x: torch.Tensor,
    scores: torch.Tensor,
    active: int,
    first: torch.Tensor,
    first_scale: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    second_scale: torch.Tensor,
    activation: str,
    block: int,
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], second.shape[1])
