"""Choose the form of a mixture of experts that can be exported, while a model is exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

EXPORTABLE = "batched_mm"
"""The implementation whose graph has no loop over experts, no sort of tokens, and no operator of its library."""

_SETTING = "_experts_implementation_internal"
"""The attribute of a config that holds the choice. Its public setter replaces None by a default, so that it could not
be restored."""


@contextmanager
def exportable_experts(model: nn.Module) -> Iterator[None]:
    """Switch every mixture of `transformers` in the model to the implementation that can be exported.

    A mixture there looks up its implementation at each call, by a name in its config; all of them read the same weights
    and compute the same. The names are restored on exit, also after an error. The proof of a capture runs outside of
    this block, with the implementation that the user chose.
    """
    configs = list({id(config): config for config in _mixture_configs(model)}.values())
    chosen = [getattr(config, _SETTING) for config in configs]
    try:
        for config in configs:
            setattr(config, _SETTING, EXPORTABLE)
        yield
    finally:
        for config, name in zip(configs, chosen):
            setattr(config, _SETTING, name)


def _mixture_configs(model: nn.Module) -> Iterator[Any]:
    """The config of each module whose forward looks up its implementation: such a module has the method `_apply_gate`."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "_apply_gate") and hasattr(config, _SETTING):
            yield config
