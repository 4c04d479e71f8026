"""Run a model without leaving a trace on it: modes, buffers, attributes, hooks, gradients and random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restore on exit what running a model in any mode may change, except writes into parameters (`kept_weights.py`).

    That is the mode of every module, values of buffers, attributes (also inside dicts and lists of a module: hooks,
    submodules, caches), `.grad` and `requires_grad`, and the states of the generators of Python, numpy and torch.
    """
    attributes = [(module, _contents(module)) for module in model.modules()]
    buffers = [(item, item.clone()) for item in model.buffers() if item.device.type != "meta"]
    gradients = [(item, item.grad, item.requires_grad) for item in model.parameters()]
    training = model.training
    generators = _generator_states()
    try:
        yield
    finally:
        model.train(training)  # a module may do more than set its flag: let it undo that
        for module, contents in attributes:
            _restore(module, contents)
        for buffer, value in buffers:  # batch norm does not count its writes as a new version
            if not torch.equal(buffer, value):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(value)
        for parameter, gradient, requires_grad in gradients:
            parameter.grad = gradient
            parameter.requires_grad_(requires_grad)
        _set_generators(generators)


def training_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """The mode that each module keeps when the model trains; empty, for `model.train()`, if all of it is in `eval()`.

    Parts of a model are in `eval()` because they are to stay frozen; a whole model, because it was loaded or served so.
    """
    modes = {module: module.training for module in model.modules()}
    return modes if any(modes.values()) else {}


def set_training(model: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Put a model into training mode, with the modes of `training_modes`."""
    model.train()
    for module, mode in modes.items():
        module.training = mode


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of a module: each value, and a shallow copy of it if it is a dict or a list."""
    return {
        name: (value, value.copy() if isinstance(value, (dict, list)) else None)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in module.__dict__ if name not in contents]:
        del module.__dict__[name]
    for name, (value, copy) in contents.items():
        module.__dict__[name] = value
        if isinstance(value, dict):
            value.clear()
            value.update(copy)
        elif isinstance(value, list):
            value[:] = copy


def _generator_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda


def _set_generators(states: tuple[Any, ...]) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)
