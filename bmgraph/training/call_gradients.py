"""The forward and the backward of one call, traced once for all calls of its kind.

A model repeats its layers, so most of its calls are of a few kinds: one operator on values of one shape. With symbolic
shapes it takes a hundred times longer to trace a call than to copy its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from bmgraph.ir.program import output_node
from bmgraph.utils.torch_internals import distinct, traced_so_far

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(eq=False)
class Value:
    """A tensor or a symbolic number that a call returns or that a graph is given."""

    fake: Any
    """What stands for it while tracing: a fake tensor with its `requires_grad`, or a symbolic number."""
    node: fx.Node | None = None
    """Its node in the joint graph, as soon as there is one. Symbolic numbers are computed where they are read."""

    @property
    def trains(self) -> bool:
        """Whether it depends on a parameter that trains."""
        return isinstance(self.fake, torch.Tensor) and self.fake.requires_grad


@dataclass(eq=False)
class Call:
    """A call on values. Calls of one `kind` are traced alike."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: list[Value] = field(init=False)
    """The values among its arguments, each once."""
    kind: tuple[Any, ...] = field(init=False)
    result: Any = None
    """What it returns: a value, or values and constants in lists."""

    def __post_init__(self) -> None:
        self.reads = list(dict.fromkeys(leaves((self.args, self.kwargs), Value)))
        place = {value: f"<{index}>" for index, value in enumerate(self.reads)}
        text = repr(replaced((self.args, self.kwargs), Value, place.__getitem__))
        self.kind = (self.target, text, *(kind_of(value) for value in self.reads))

    @property
    def returns(self) -> list[Value]:
        """The values in its result."""
        return list(leaves(self.result, Value))

    def inputs(self) -> list[Any]:
        """Fake values like those that it reads, as leaves of autograd."""
        return [
            value.fake.detach().requires_grad_(value.trains)
            if isinstance(value.fake, torch.Tensor)
            else value.fake
            for value in self.reads
        ]

    def on(self, inputs: list[Any]) -> Any:
        """What it returns for other values in place of those that it reads."""
        held = dict(zip(self.reads, inputs))
        args, kwargs = replaced((self.args, self.kwargs), Value, held.__getitem__)
        return self.target(*args, **kwargs)


@dataclass(frozen=True)
class CallTrace:
    """The graph of a call and of its backward."""

    module: fx.GraphModule
    """Its placeholders are the values that the call reads, then the gradients that it was traced with, in order."""
    forward: frozenset[str]
    """The names of the nodes of the forward."""
    returned: tuple[Any, ...]
    """What gives the values that the call returns, in order: nodes, or constants."""
    gradients: tuple[fx.Node | None, ...]
    """The nodes of the new gradients of what it reads; none if it has no backward."""


def trace_call(call: Call, gradients: Mapping[int, torch.Tensor]) -> CallTrace:
    """Trace a call, and its backward if a value that it returns has a gradient.

    `gradients`: by position among what it reads and then what it returns. The gradients that the values which it reads have
    from later calls are the first terms of their new ones, in the order in which autograd adds them.
    """
    places = list(gradients)
    forward: set[str] = set()

    def joint(inputs: list[Any], given: list[torch.Tensor]) -> tuple[Any, ...]:
        returned = list(leaves(call.on(inputs), (torch.Tensor, *SYMBOLIC)))
        forward.update(traced_so_far())
        if not any(place >= len(inputs) for place in places):
            return tuple(returned)
        trained = [index for index, value in enumerate(call.reads) if value.trains]
        roots = [[*inputs, *returned][place] for place in places]
        found = torch.autograd.grad(roots, [inputs[index] for index in trained], given, allow_unused=True)
        by_place = dict(zip(trained, found))
        return (*returned, *(by_place.get(index) for index in range(len(inputs))))

    module = make_fx(joint)(
        call.inputs(), distinct(gradients.values())
    )  # calls of one kind share fake gradients
    outputs: Any = output_node(module.graph).args[0]
    count = len(call.returns)
    return CallTrace(module, frozenset(forward), tuple(outputs[:count]), tuple(outputs[count:]))


def kind_of(value: Value) -> tuple[Any, ...]:
    """What tracing depends on in a value: type, sizes, strides, and whether it has a gradient."""
    fake = value.fake
    if not isinstance(fake, torch.Tensor):
        return type(fake), fake.node.expr
    sizes = (*fake.shape, *fake.stride(), fake.storage_offset())
    return fake.dtype, fake.device, fake.requires_grad, fake.dim(), *map(expression, sizes)


def expression(size: Any) -> Any:
    """The expression of a symbolic number; a number itself."""
    return size.node.expr if isinstance(size, SYMBOLIC) else size


def leaves(structure: Any, kinds: type | tuple[type, ...]) -> Iterator[Any]:
    """The items of some types in nested lists, tuples, dicts and slices, in order."""
    if isinstance(structure, kinds):
        yield structure
    elif isinstance(structure, (list, tuple)):
        for item in structure:
            yield from leaves(item, kinds)
    elif isinstance(structure, dict):
        yield from leaves(list(structure.values()), kinds)
    elif isinstance(structure, slice):
        yield from leaves((structure.start, structure.stop, structure.step), kinds)


def replaced(structure: Any, kinds: type | tuple[type, ...], new: Callable[[Any], Any]) -> Any:
    """A copy of a structure with `new(item)` in place of the items of some types."""
    if isinstance(structure, kinds):
        return new(structure)
    if isinstance(structure, tuple):
        return tuple(replaced(item, kinds, new) for item in structure)
    if isinstance(structure, list):
        return [replaced(item, kinds, new) for item in structure]
    if isinstance(structure, dict):
        return {key: replaced(item, kinds, new) for key, item in structure.items()}
    if isinstance(structure, slice):
        bounds = (structure.start, structure.stop, structure.step)
        return slice(*(replaced(item, kinds, new) for item in bounds))
    return structure
