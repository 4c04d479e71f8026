"""A mode that runs a model in training mode without dropping anything."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_functional = torch.nn.functional

DROPOUTS = frozenset(
    {
        _functional.dropout, _functional.dropout1d, _functional.dropout2d, _functional.dropout3d,
        _functional.alpha_dropout, _functional.feature_alpha_dropout,
        torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_,
        torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_,
    }
)  # fmt: skip
"""Functions (input, p, ...) that are the identity without dropout."""

LARGEST = 1 - 2.0**-24
"""The largest number below 1 in float32."""

PROBABILITIES: dict[Any, tuple[str, int]] = {
    _functional.scaled_dot_product_attention: ("dropout_p", 4),
    _functional.multi_head_attention_forward: (
        "dropout_p",
        list(inspect.signature(_functional.multi_head_attention_forward).parameters).index("dropout_p"),
    ),
    torch.lstm: ("dropout", 5),
    torch.gru: ("dropout", 5),
    torch.rnn_tanh: ("dropout", 5),
    torch.rnn_relu: ("dropout", 5),
}
"""Functions that drop inside -> the name and the position of the probability among their arguments."""


UNIFORM = frozenset({torch.rand, torch.rand_like})
"""Functions that draw numbers from 0 to 1."""

BELOW = frozenset(
    {torch.lt, torch.le, torch.Tensor.lt, torch.Tensor.le, torch.Tensor.__lt__, torch.Tensor.__le__}
)
"""Comparisons (draws, probability) that are true where something is kept."""


class NoDropout(TorchFunctionMode):
    """Runs a model with every dropout probability set to 0, and with every written-out random mask (drop path) set to 1.

    A mask is drawn by `torch.bernoulli`, or made from uniform draws u, which are all the largest number below 1: then
    `u > p` and `floor(u + keep)` are 1, and `u < keep` is set to it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in UNIFORM:
            drawn = func(*args, **kwargs).fill_(LARGEST)
            drawn.is_draw = True
            return drawn
        if func in BELOW and getattr(args[0], "is_draw", False):
            return func(*args, **kwargs).fill_(True)
        if func is torch.Tensor.bernoulli_ and not any(isinstance(item, torch.Tensor) for item in args[1:]):
            return args[0].fill_(1)
        if func is torch.bernoulli:
            return func(*args, **kwargs).fill_(1)
        name, position = PROBABILITIES.get(func, ("", 0))
        if name in kwargs:
            kwargs[name] = 0.0
        elif name and len(args) > position and isinstance(args[position], float):
            args = (*args[:position], 0.0, *args[position + 1 :])
        return func(*args, **kwargs)
