"""Find the model in what wraps it: torch.compile, data parallelism, PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bmgraph.errors import CaptureError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model under its wrappers, so that its inputs, parameters and modules have their own names.

    Raises CaptureError for a PEFT model whose prompt or prefix lives in the wrapper.
    """
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, _PARALLEL):
        module = model.module
        assert isinstance(module, nn.Module)
        return module
    compiled = model.__dict__.get("_modules", {}).get("_orig_mod")
    if isinstance(compiled, nn.Module):  # torch.compile(model)
        return compiled
    adapters = getattr(model, "peft_config", None)
    base = getattr(model, "get_base_model", None)
    if not isinstance(adapters, dict) or base is None:
        return None
    for name, config in adapters.items():
        if getattr(config, "is_prompt_learning", False):
            raise CaptureError(
                f"PEFT's adapter {name!r} ({config.peft_type}) lives in the wrapper: capture `model.get_base_model()` "
                "and train a prompt with the pass SoftPrompt"
            )
    found = base()
    return found if isinstance(found, nn.Module) and found is not model else None


@contextmanager
def compiled_parts_as_written(model: nn.Module) -> Iterator[None]:
    """Let the parts of a model that were compiled run as they are written: a compiled part cannot be traced."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    in_place: list[tuple[nn.Module, object]] = []
    for module in list(model.modules()):
        if module.__dict__.get("_compiled_call_impl") is not None:  # module.compile()
            in_place.append((module, module.__dict__["_compiled_call_impl"]))
            module.__dict__["_compiled_call_impl"] = None
        for name, child in module._modules.items():
            compiled = child is not None and child._modules.get("_orig_mod")
            if isinstance(compiled, nn.Module) and child is not None:
                replaced.append((module, name, child))
                module._modules[name] = compiled
    try:
        yield
    finally:
        for module, name, child in replaced:
            module._modules[name] = child
        for module, call in in_place:
            module.__dict__["_compiled_call_impl"] = call
