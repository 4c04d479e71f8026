"""Gives a model on the meta device the weights of a folder, while it is captured, and its program the files themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmgraph.analysis.computation_lines import computation_of
from bmgraph.distributed.process_group import Ranks
from bmgraph.errors import CaptureError
from bmgraph.frontend.stored_names import names_in_file, unknown_names
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import propagate
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.serialize.opened import open_user_file
from bmgraph.serialize.stored_file import stored_tensors
from bmgraph.serialize.weight_files import check_regular_files, weight_files
from bmgraph.utils.digest import content_digest, fingerprint
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.stored_tensor import StoredTensor, in_memory

NOT_PROVEN = "not compared with the model"
"""Begins what `Program.unproven` says of a program whose weights do not fit in memory."""

_META = torch.device("meta")
_MARKS = (-3, 5)
"""Values that are put into a buffer to see whether the model's own initialization writes it."""


@dataclass
class FolderWeights:
    """The weights of a folder for one model: parameters and buffers by all their names. `fits`: in memory, together."""

    folder: Path
    parameters: dict[str, StoredTensor]
    buffers: dict[str, torch.Tensor]
    fits: bool
    example: dict[str, torch.Tensor] = field(default_factory=dict)
    """The inputs with their values, once `inputs` was asked."""
    compared: bool = False
    """Whether a part of the program, with the weights of that, was compared with the model."""

    def resident(self) -> FolderWeights:
        """The same weights, which stay in memory once they are read, while the result lives."""
        made: dict[int, StoredTensor] = {}
        for tensor in self.parameters.values():
            if id(tensor) not in made:
                made[id(tensor)] = StoredTensor(tensor.source.with_residence(True))
        parameters = {name: made[id(tensor)] for name, tensor in self.parameters.items()}
        return replace(self, parameters=parameters, fits=True)

    def inputs(self, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The example to capture with, where the model runs; raises CaptureError if it has no values."""
        for name, value in example.items():
            if value.device.type == "meta":
                raise CaptureError(
                    f"input {name!r} of the example is on the meta device: with weights= its values are needed"
                )
        self.example = dict(example)
        return {name: value if self.fits else value.to(_META) for name, value in example.items()}

    def give(self, program: Program) -> None:
        """Put the weights and the values of the example into a program that was captured with `placed_weights`, in place.

        Raises CaptureError for a tensor of the program that has no values.
        """
        self.put_weights(program)
        program.fingerprint = fingerprint(program.parameters)
        if self.fits:
            return
        self.put_example(program)
        if not (self.compared or any(line.startswith(NOT_PROVEN) for line in program.unproven)):
            size = sum(tensor.nbytes for tensor in program.parameters.values())
            program.unproven = (
                *program.unproven,
                f"{NOT_PROVEN}: its weights of {size / 1e9:.1f} GB do not fit in memory",
            )
        program.computation = computation_of(program)

    def put_weights(self, program: Program) -> None:
        """Put the weights and buffers in the place of those on the meta device."""
        for name, tensor in program.parameters.items():
            program.parameters[name] = self.parameters.get(name, tensor)
        for name, tensor in program.buffers.items():
            if tensor.device.type == "meta":
                program.buffers[name] = self.buffers.get(name, tensor)
        for name, tensor in program.tensors().items():
            if tensor.device.type == "meta":
                raise CaptureError(
                    f"{name!r} has no values: forward makes it on the meta device; make it in __init__ and register it as a buffer"
                )

    def put_example(self, program: Program) -> None:
        """Give a program that was captured on the meta device the values of its example, and infer its shapes anew."""
        program.example = {
            name: self.example[name][tuple(map(slice, value.shape))]
            for name, value in program.example.items()
        }
        propagate(program, everything=True)


def open_weights(
    model: nn.Module, folder: Path, trains: bool = False, memory: int | None = None
) -> FolderWeights:
    """The weights of a folder for a model on the meta device; none but those of buffers is read.

    They fit in memory if they do so for all ranks, in `memory` bytes if that is given; never for a model that several ranks are to
    train (`trains`).

    Names match as transformers matches them, tied weights are stored once or equal. Buffers that are not saved keep their
    values or, on the meta device, get those of the model's own initialization. Raises CaptureError unless the folder has
    exactly the weights of the model, with its shapes and types.
    """
    _check_on_meta(model)
    if not folder.is_dir():
        raise CaptureError(f"weights={str(folder)!r}: there is no such folder")
    check_regular_files(folder)
    files = weight_files(folder)
    opened = [(open_user_file(file, "folder"), file.absolute()) for file in files]
    ranks = Ranks.here().size
    size = sum(file.status.st_size for file, _ in opened)
    fits = not (trains and ranks > 1) and size * ranks <= (memory_budget() if memory is None else memory)
    stored: dict[str, StoredTensor] = {}
    for file, path in opened:
        found = stored_tensors(file, path, fits)
        twice = sorted(found.keys() & stored.keys())
        if twice:
            raise CaptureError(f"{folder} holds {twice[0]} in two files: complete the folder anew")
        stored |= found
    return _matched(model, folder, stored, fits)


def _check_on_meta(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            raise CaptureError(
                f"weights= is for a model without weights, but its parameter {name!r} has values: make the model under "
                "`with torch.device('meta'):`, or leave weights= out"
            )


def _matched(model: nn.Module, folder: Path, stored: dict[str, StoredTensor], fits: bool) -> FolderWeights:
    state: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    saved = model.state_dict(keep_vars=True).keys()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    names = names_in_file(model, {*state, *(saved & buffers.keys())}, stored)
    problems = [
        f"holds {name} as {_text(stored[inner])}, where the model has {_text(tensor)}"
        for name, tensor in {**buffers, **state}.items()
        if (inner := names.get(name)) is not None and _text(stored[inner]) != _text(tensor)
    ]
    groups: dict[int, list[str]] = {}
    for name, parameter in state.items():
        groups.setdefault(id(parameter), []).append(name)
    parameters: dict[str, StoredTensor] = {}
    for aliases in groups.values():
        held = [stored[names[alias]] for alias in aliases if alias in names]
        if not held:
            problems.append(f"holds no weights for {aliases[0]}")
            continue
        if any(content_digest(other) != content_digest(held[0]) for other in held[1:]):
            problems.append(f"holds different values for {' and '.join(aliases)}, which the model ties")
        parameters |= dict.fromkeys(aliases, held[0])
    problems += [
        f"holds weights for {name}, which the model does not have"
        for name in unknown_names(model, names, stored)
    ]
    if problems:
        more = f" (and {len(problems) - 1} more such differences)" if len(problems) > 1 else ""
        raise CaptureError(
            f"{folder} {problems[0]}{more}: make the model as its config.json says, with the type of its weights (dtype=)"
        )
    values = {name: in_memory(stored[names[name]]) for name in buffers if name in names}
    values |= {
        name: item for name, item in buffers.items() if name not in names and item.device.type != "meta"
    }
    return FolderWeights(
        folder, parameters, values | _initialized(model, buffers.keys() - values.keys()), fits
    )


def _text(tensor: torch.Tensor) -> str:
    return f"{DTYPE_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}"


def _initialized(model: nn.Module, names: set[str]) -> dict[str, torch.Tensor]:
    """The values that a model's `_init_weights` gives to buffers on the meta device, as transformers has it compute them.

    Raises CaptureError where it does not write all of a buffer.
    """
    if not names:
        return {}
    initialize: Any = getattr(model, "_init_weights", None)
    found: list[dict[str, torch.Tensor]] = []
    for mark in _MARKS if callable(initialize) else ():
        found.append({})
        for path, module in model.named_modules():
            leaves = [leaf for leaf in module._buffers if (f"{path}.{leaf}" if path else leaf) in names]
            if leaves:
                made = _run_initialization(initialize, module, leaves, mark)
                found[-1] |= {f"{path}.{leaf}" if path else leaf: value for leaf, value in made.items()}
    for name in sorted(names):
        if len(found) != len(_MARKS) or not torch.equal(*(item[name] for item in found)):
            raise CaptureError(
                f"buffer {name!r} is on the meta device, is not among the saved weights, and the model has no initialization "
                "(`_init_weights`) that computes it: give it values before capturing, or make the model with "
                "accelerate.init_empty_weights(), which leaves buffers on the CPU"
            )
    return found[0] if found else {}


def _run_initialization(
    initialize: Callable[[nn.Module], object], module: nn.Module, leaves: list[str], mark: int
) -> dict[str, torch.Tensor]:
    """What an initialization makes of some buffers of a module that are filled with `mark`."""
    before = dict(module._buffers)
    try:
        for leaf in leaves:
            old = before[leaf]
            assert old is not None
            module._buffers[leaf] = torch.full(old.shape, mark, dtype=old.dtype, device="cpu")
        with torch.random.fork_rng(devices=()), torch.no_grad():
            initialize(module)
        return {leaf: value for leaf in leaves if (value := module._buffers[leaf]) is not None}
    finally:
        module._buffers.update(before)


@contextmanager
def placed_weights(model: nn.Module, weights: FolderWeights | None) -> Iterator[None]:
    """Within it, the model has the weights if they fit in memory; else no tensor of it has values. Undone on exit."""
    if weights is None:
        yield
        return
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    given: dict[int, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if weights.fits and id(parameter) not in given:
            values = in_memory(weights.parameters[name])
            given[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        given[id(buffer)] = weights.buffers[name] if weights.fits else buffer.to(_META)
    try:
        for module, parameters, buffers in before:
            module._parameters.update({leaf: given.get(id(item), item) for leaf, item in parameters.items()})
            module._buffers.update({leaf: given.get(id(item), item) for leaf, item in buffers.items()})
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
