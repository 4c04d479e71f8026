"""Turn off the KV cache that a model makes by its config, while it is captured: a pass adds one to the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_SETTING = "use_cache"


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Set `use_cache` of every config in the model to False; restored on exit, also after an error.

    A forward that passes its `**kwargs` on to a part that makes the cache has no input of that name, and the part asks its
    config.
    """
    found = [getattr(module, "config", None) for module in model.modules()]
    configs = list(
        {id(config): config for config in found if getattr(config, _SETTING, None) is True}.values()
    )
    try:
        for config in configs:
            setattr(config, _SETTING, False)
        yield
    finally:
        for config in configs:
            setattr(config, _SETTING, True)
