"""Find parameters that a model reads but does not register: in a plain list or dict no optimizer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from bmgraph.ir.program import Program


def unregistered_parameters(program: Program, model: nn.Module) -> list[str]:
    """Where the model keeps parameters that export made constants of the program, such as `blocks.0.weights[1]`."""
    known = {id(parameter) for parameter in model.parameters()}
    constants = {
        buffer.data_ptr() for name, buffer in program.buffers.items() if name.startswith("constant.")
    }
    return [
        place
        for path, module in model.named_modules()
        for attribute, value in module.__dict__.items()
        if not attribute.startswith("_")
        for place, parameter in _parameters_in(value, ".".join(filter(None, (path, attribute))))
        if parameter.requires_grad and id(parameter) not in known and parameter.data_ptr() in constants
    ]


def _parameters_in(value: Any, place: str) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(value, nn.Parameter):
        yield place, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _parameters_in(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _parameters_in(item, f"{place}[{key!r}]")
