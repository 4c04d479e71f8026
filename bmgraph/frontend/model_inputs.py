"""The inputs of a model's forward by name, whatever its signature: named, `*args` or `**kwargs`, tensors or flags."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bmgraph.errors import CaptureError

Example = Mapping[str, Any] | Sequence[Any]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class ModelInputs:
    """An example, split into tensors and constants."""

    tensors: dict[str, torch.Tensor]
    """Contiguous copies: export would take one tensor under two names for one input, and tie sizes to strides."""
    constants: dict[str, Any]
    """Flags (bool, int, float, str, None), which become constants of the program."""
    unread: frozenset[str] = frozenset()
    """Tensors that forward does not take: inputs of the program that it does not read."""


def not_taken(model: nn.Module, example: Example) -> frozenset[str]:
    """The tensors of an example by name that forward does not take."""
    parameters = inspect.signature(model.forward).parameters
    if not isinstance(example, Mapping) or any(item.kind is item.VAR_KEYWORD for item in parameters.values()):
        return frozenset()
    stars = _star_names(_star(parameters), example)
    tensors = {name for name, value in example.items() if isinstance(value, torch.Tensor)}
    return frozenset(tensors.difference(parameters, stars))


def split_example(model: nn.Module, example: Example, unread: Collection[str] = ()) -> ModelInputs:
    """The example of a model by name. The items of `*args` are called `args_0`, `args_1`, ...; forward does not get `unread`.

    Turns off the KV cache that a forward can return, because a pass adds one. Raises CaptureError if the example does
    not fit forward.
    """
    inputs = _by_name(inspect.signature(model.forward).parameters, example, unread)
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    if not tensors:
        raise CaptureError("the example has no tensor: give at least one input of the model's forward")
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    if "use_cache" in inspect.signature(model.forward).parameters:
        constants.setdefault("use_cache", False)
    return ModelInputs(_repeat_batch_of_one(tensors), constants, frozenset(unread))


def forward_by_name(model: nn.Module, inputs: ModelInputs) -> Callable[..., object]:
    """The model's forward as a function that takes just the example's tensors, by name, and passes the constants on."""
    original = model.forward
    parameters = inspect.signature(original).parameters
    positional = [name for name, item in parameters.items() if item.kind in _POSITIONAL]
    star = _star(parameters)

    def forward(**tensors: torch.Tensor) -> Any:
        values = {**inputs.constants, **tensors}
        values = {name: value for name, value in values.items() if name not in inputs.unread}
        rest = [values.pop(name) for name in _star_names(star, values)]
        by_place = [
            name for name in positional if rest or parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
        ]
        first = [values.pop(name, parameters[name].default) for name in by_place]
        return original(*first, *rest, **values)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs.tensors]
    )
    return forward


def _star(parameters: Mapping[str, inspect.Parameter]) -> str:
    """The name of `*args`; empty if forward has none."""
    return next(
        (name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_POSITIONAL), ""
    )


def _star_names(star: str, names: Mapping[str, Any]) -> list[str]:
    """Which of the names stand for items of `*args`, in order."""
    found = [name for name in names if star and re.fullmatch(rf"{star}_\d+", name)]
    return sorted(found, key=lambda name: int(name.rsplit("_", 1)[1]))


def _by_name(
    parameters: Mapping[str, inspect.Parameter], example: Example, unread: Collection[str]
) -> dict[str, Any]:
    """The example as a dict by input of forward; raises CaptureError if it does not fit."""
    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, Mapping):
        example = _from_sequence(parameters, example)
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    star_names = _star_names(_star(parameters), example)
    for name, value in example.items():
        if name not in (*parameters, *star_names, *unread) and not open_ended:
            raise CaptureError(f"forward has no input {name!r}; it takes {', '.join(parameters)}")
        if not name.isidentifier():
            raise CaptureError(f"input {name!r} is not a Python name: give it another in forward's **kwargs")
        if not isinstance(value, (torch.Tensor, bool, int, float, str, type(None))):
            raise CaptureError(
                f"input {name!r} is a {type(value).__name__}: give tensors or flags (bool, int, float, str, None)"
            )
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty and item.kind in _POSITIONAL and name not in example
    ]
    if missing:
        raise CaptureError(f"the example lacks {', '.join(map(repr, missing))}, which forward needs")
    return dict(example)


def _from_sequence(parameters: Mapping[str, inspect.Parameter], example: Sequence[Any]) -> dict[str, Any]:
    star = _star(parameters)
    if star:
        names = [name for name, item in parameters.items() if item.kind in _POSITIONAL]
        names += [f"{star}_{index}" for index in range(len(example) - len(names))]
    else:
        names = [name for name, item in parameters.items() if item.kind is not inspect.Parameter.VAR_KEYWORD]
    if len(example) > len(names):
        raise CaptureError(
            f"the example has {len(example)} inputs, but forward takes {len(names)}: {', '.join(names)}"
        )
    return dict(zip(names, example))


def _repeat_batch_of_one(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repeat a batch of 1, because export would fix its size."""
    with_batch = [tensor for tensor in tensors.values() if tensor.dim() > 0]
    if not with_batch or any(tensor.shape[0] != 1 for tensor in with_batch):
        return tensors
    return {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }
