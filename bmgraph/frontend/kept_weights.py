"""Undo what running a model, or changing its mode, writes into its parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bmgraph.ir.program import Program
from bmgraph.ops.traits import argument, traits_of


@contextmanager
def weights_as_found(model: nn.Module) -> Iterator[None]:
    """Undo on exit what the model's runs write into parameters, by operators (`w.data.div_(2)`) or as `w.data = ...`.

    A parameter is copied when it is first written, so what only reads its weights costs no memory. Do not export inside.
    """
    kept = [(item, item.data) for item in model.parameters() if item.device.type != "meta"]
    before_writes = _BeforeWrites([data for _, data in kept])
    try:
        with before_writes:
            yield
    finally:
        before_writes.undo()
        _point_back(kept)


@contextmanager
def weights_through_modes(model: nn.Module) -> Iterator[ModeWrites]:
    """Undo on exit what the `train` and `eval` methods of the model's own classes write into parameters.

    Some layers merge a delta into their weight in `eval()`. Weights that no such method writes into are not copied.
    """
    kept = [(item, item.data) for item in model.parameters() if item.device.type != "meta"]
    writes = ModeWrites(model)
    try:
        yield writes
    finally:
        writes.undo()
        _point_back(kept)


class ModeWrites:
    """Watches what the changes of a model's mode write into its parameters; `seen` are the modes that it was put in."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[bool] = set()
        self._own = [
            module
            for module in model.modules()
            if type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
        ]
        below = {id(item): item for module in self._own for item in module.parameters()}
        tensors = [item.data for item in below.values() if item.device.type != "meta"]
        self._below = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._writes = _BeforeWrites(tensors)
        for module in self._own:
            module.__dict__.update(train=self._watched(module.train), eval=self._watched(module.eval, False))

    def may_write(self, tensor: torch.Tensor) -> bool:
        """Whether the next change of mode may write into a tensor: what one has written into, of a model that was put in
        both; else whatever is below a class with such a method."""
        pointer = tensor.untyped_storage().data_ptr()
        return pointer in (self._writes.written if self.seen == {True, False} else self._below)

    def undo(self) -> None:
        """Write back what was there before, and stop watching."""
        for module in self._own:
            del module.__dict__["train"], module.__dict__["eval"]
        self._writes.undo()

    def _watched(self, method: Callable[..., nn.Module], *given: bool) -> Callable[..., nn.Module]:
        def change(*mode: bool, **named: bool) -> nn.Module:
            self.seen.add((*mode, *named.values(), *given, True)[0])
            with self._writes:
                return method(*mode, **named)

        return change


def own_moving_weights(program: Program, writes: ModeWrites) -> None:
    """Give the program copies of those weights that the next change of the model's mode may write into."""
    for name, tensor in program.parameters.items():
        if tensor.device.type != "meta" and writes.may_write(tensor):
            program.parameters[name] = tensor.clone()


def own_statistics(program: Program) -> None:
    """Give the program copies of the buffers that a run of the model in training mode writes into."""
    written = set(program.writes)
    for node in program.graph.nodes:
        held = [argument(node, name) for name in traits_of(node).writes]
        written |= {str(item.target) for item in held if isinstance(item, fx.Node)}
    for name in written & program.buffers.keys():
        program.buffers[name] = program.buffers[name].clone()


def _point_back(kept: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, data in kept:
        if not parameter.data.is_set_to(data):
            parameter.data = data


class _BeforeWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies a storage of the given tensors just before an operator writes into it."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        storages = [tensor.untyped_storage() for tensor in tensors]
        self._storages = {storage.data_ptr(): storage for storage in storages}
        self._copies: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func._schema.is_mutable:
            for index, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._keep(args[index] if index < len(args) else given.get(argument.name))
        return func(*args, **given)

    @property
    def written(self) -> set[int]:
        """The storages that something has written into, by their pointers."""
        return set(self._copies)

    def undo(self) -> None:
        """Write the copies back."""
        for pointer, copy in self._copies.items():
            self._storages[pointer].copy_(copy)

    def _keep(self, written: Any) -> None:
        for tensor in written if isinstance(written, (list, tuple)) else (written,):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            pointer = tensor.untyped_storage().data_ptr()
            if pointer in self._storages and pointer not in self._copies:
                self._copies[pointer] = self._storages[pointer].clone()  # type: ignore[no-untyped-call]
