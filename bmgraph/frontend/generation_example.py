"""Complete an example for generation: prompts of unequal length need a mask, also where the example has none."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn

from bmgraph.frontend.model_inputs import Example
from bmgraph.frontend.unwrap import unwrapped

MASK = "attention_mask"


def with_attention_mask(model: nn.Module, example: Example) -> Example:
    """The example with an `attention_mask` of ones, i64[batch, sequence], if forward takes one and it has ids alone.

    Without a mask among its inputs, a program cannot tell padding from prompt.
    """
    if MASK not in inspect.signature(unwrapped(model).forward).parameters:
        return example
    if not isinstance(example, Mapping):
        example = (example,) if isinstance(example, torch.Tensor) else example
        if len(example) != 1:
            return example
        first = next(iter(inspect.signature(unwrapped(model).forward).parameters))
        example = {first: example[0]}
    tensors = {name: value for name, value in example.items() if isinstance(value, torch.Tensor)}
    if MASK in example or not tensors or not all(map(_are_ids, tensors.values())):
        return example
    if len(tensors) > 1 and not all(name.endswith("ids") for name in tensors):
        return example
    ids = tensors.get("input_ids", next(iter(tensors.values())))
    return {**example, MASK: torch.ones(ids.shape, dtype=torch.int64, device=ids.device)}


def _are_ids(value: torch.Tensor) -> bool:
    return value.dim() == 2 and value.dtype in (torch.int64, torch.int32)
