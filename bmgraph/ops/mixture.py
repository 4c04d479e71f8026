"""A whole mixture-of-experts feed-forward in one call, as inference kernels compute it.

Shapes as in `bmgraph.ops.experts`: T tokens, K selected per token, E experts, I inputs, S neurons, D outputs. The first
linear has O = S outputs, or O = 2 S for "swiglu", whose rows alternate: gate, up, gate, up, ...
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
"""The activation between the two linears, by its name in kernels."""


@torch.library.custom_op("bmgraph::mixture", mutates_args=())
def mixture(
    x: torch.Tensor,
    ids: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor | None,
    second: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """x f[T, I], ids i64[T, K], first f[E, O, I], first_bias f[E, O] or None, second f[E, D, S] -> f[T, D].

    `activation` is a key of ACTIVATIONS. The outputs of the selected experts are summed with equal weights.
    """
    hidden = torch.ops.bmgraph.experts_linear(x, first, ids, first_bias)
    outputs: torch.Tensor = torch.ops.bmgraph.experts_linear(ACTIVATIONS[activation](hidden), second, ids)
    return outputs.sum(-2)


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
    """`mixture` of the `active` experts with the highest scores f[T, E], on weights of u8 codes around ZERO -> f[T, D].

    Without blocks (`block` is 0) the scales are f[E, O] and f[E, D]. Otherwise each scale covers `block` inputs, as in
    f[E, O, I / block], and the inputs of both linears are quantized by the same blocks (`quantize_blocks`).
    """

    def weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        steps = scale.repeat_interleave(block, 2) if block else scale.unsqueeze(-1)
        return (codes.to(x.dtype) - ZERO) * steps

    def entering(value: torch.Tensor) -> torch.Tensor:
        rounded: torch.Tensor = torch.ops.bmgraph.quantize_blocks(value, block) if block else value
        return rounded

    experts_linear, ids = torch.ops.bmgraph.experts_linear, scores.topk(active).indices
    hidden = experts_linear(entering(x), weight(first, first_scale), ids, first_bias)
    hidden = entering(ACTIVATIONS[activation](hidden))
    output: torch.Tensor = experts_linear(hidden, weight(second, second_scale), ids).sum(-2)
    return output


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
