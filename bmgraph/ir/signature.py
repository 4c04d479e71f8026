"""The signature of one graph of a program: what it takes, what it returns, and for which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch

from bmgraph.ir.cache_spec import CacheLayout
from bmgraph.ir.tensor_spec import Range, TensorSpec

if TYPE_CHECKING:
    from bmgraph.ir.program import Program

Value = TypeVar("Value")


@dataclass(frozen=True)
class Signature:
    """What one graph of a program takes and returns; a program has one for each graph, under the graph's name."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    ranges: dict[str, Range] = field(default_factory=dict)
    """Name of a dynamic size -> its range."""
    writes: tuple[str, ...] = ()
    """Buffers whose new values the graph returns after its outputs, in this order."""
    losses: tuple[str, ...] = ()
    """Outputs that are losses: scalars to minimize."""
    symbols: dict[Any, str] = field(default_factory=dict)
    """Symbol of the graph's shape environment -> the name of its size."""
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    """The inputs that the graph was captured with; verification compares outputs on them."""
    fixed: tuple[str, ...] = ()
    """Sizes that were requested as dynamic, but that the model fixes."""
    narrower: tuple[str, ...] = ()
    """One line for each size in `fixed` of which the captured model takes others."""
    ignored: tuple[str, ...] = ()
    """Inputs of the captured model that no output needs any more, such as labels: a batch may hold them."""
    unproven: tuple[str, ...] = ()
    """Batches on which the captured graph was not compared with its model, because the model refused them."""
    cache: CacheLayout | None = None
    """Which inputs and outputs are a KV cache, as the pass that added it says; None without one."""

    def copy(self) -> Signature:
        """A copy with tables of its own."""
        return replace(self, ranges=dict(self.ranges), symbols=dict(self.symbols), example=dict(self.example))


class OfEntry(Generic[Value]):
    """An attribute of a program that is a field of its entry's signature, read and set there."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, program: None, owner: type) -> OfEntry[Value]: ...
    @overload
    def __get__(self, program: Program, owner: type) -> Value: ...
    def __get__(self, program: Program | None, owner: type) -> Any:
        """The field of the entry's signature."""
        return self if program is None else getattr(program.signatures[program.entry], self._name)

    def __set__(self, program: Program, value: Value) -> None:
        """Give the entry a signature with another value of the field."""
        changed: dict[str, Any] = {self._name: value}
        program.signatures[program.entry] = replace(program.signatures[program.entry], **changed)
