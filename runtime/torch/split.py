"""Runs one graph on several devices, each with its share of the layers; activations move between them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from bmgraph.errors import InputError
from bmgraph.ir.eval_form import eval_form
from bmgraph.ir.program import Program, copy_graph
from bmgraph.ir.shape_inference import creates_tensor
from bmgraph.pass_manager.report import Report
from bmgraph.runtime.torch.device_plan import Parts, Share, loads_of, part_device, parts_of, shares_of
from bmgraph.utils.graph_copies import copy_node
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.stored_tensor import is_too_large, to_run

Attributes = dict[str, tuple[str, int]]
"""What a split graph calls a tensor -> the tensor's name, and the number of its device."""


class Devices:
    """Devices that the graphs of a program share, with the bytes that are left on each. The same device may stand several times.

    Raises InputError for a device that is not there.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.places = tuple(map(_device, names))
        self.left = [free_bytes(place) // self.places.count(place) for place in self.places]
        self._placed: dict[tuple[str, torch.device], torch.Tensor] = {}

    def module(self, program: Program, report: Report) -> nn.Module:
        """A module that runs the entry of a program on the devices; the report is told what each holds.

        Raises BackendError where it does not fit.
        """
        graph = copy_graph(program.graph)
        eval_form(graph, len(program.outputs))
        parts = parts_of(program, len(self.places))
        shares = shares_of(loads_of(program, graph, parts), self.left)
        self.left = [left - share.total for left, share in zip(self.left, shares)]
        split, attributes = split_graph(program, graph, parts, shares, self.places)
        root = {name: self._tensor(program, *of) for name, of in attributes.items()}
        lines = [
            f"{place}: {share.weights / 1e6:,.1f} MB of weights, {share.held / 1e6:,.1f} of inputs and outputs, "
            f"{share.activations / 1e6:,.1f} of activations"
            for place, share in zip(self.places, shares)
        ]
        report.notes.append(f"{program.entry} is split: {'; '.join(lines)}")
        return fx.GraphModule(root, split)

    def placed(self, program: Program) -> Program:
        """A copy of a program that is wholly on the one device there is, with the tensors of its module."""
        copy = program.clone()
        for table in (copy.parameters, copy.buffers):
            for name in table:
                table[name] = self._tensor(program, name, 0).detach()
        return copy

    def _tensor(self, program: Program, name: str, number: int) -> Any:
        """A tensor on a device; each stands there once."""
        place = self.places[number]
        if (name, place) not in self._placed:
            found = to_run(program.tensor(name))
            self._placed[name, place] = found if found.device == place else found.to(place)
        found = self._placed[name, place]
        trained = name in program.parameters and not is_too_large(found)
        return nn.Parameter(found, requires_grad=False) if trained else found


def split_graph(
    program: Program, graph: fx.Graph, parts: Parts, shares: Sequence[Share], places: Sequence[torch.device]
) -> tuple[fx.Graph, Attributes]:
    """The graph with each call on the device of its part; values move where they are read on another one, once.

    Tensors, and what is computed of them alone, are on each device that reads them.
    """
    return _Splitting(program, graph, parts, part_device(shares), places).run()


class _Splitting:
    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        parts: Parts,
        devices: Mapping[int, int],
        places: Sequence[torch.device],
    ) -> None:
        self._program, self._graph, self._parts, self._devices, self._places = (
            program,
            graph,
            parts,
            devices,
            places,
        )
        self._made = fx.Graph()
        self._at: dict[tuple[fx.Node, int], fx.Node] = {}
        """(node, device) -> its value there."""
        self._home: dict[fx.Node, int | None] = {}
        """The device that a value was computed on; None for inputs, which come from anywhere."""
        self._attributes: Attributes = {}

    def run(self) -> tuple[fx.Graph, Attributes]:
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._home[node] = None
                self._at[node, -1] = self._made.node_copy(node)
            elif node.op == "output":
                self._made.output(fx.map_arg(node.args[0], self._returned)).meta = dict(node.meta)
            elif node.op == "call_function" and node.name not in self._parts.constants:
                self._call(node, self._device_of(node))
        self._made.lint()
        return self._made, self._attributes

    def _device_of(self, node: fx.Node) -> int:
        if node.target is operator.getitem:  # an item is where the whole is
            source = node.args[0]
            home = self._home.get(source) if isinstance(source, fx.Node) else None
            if home is not None:
                return home
        return self._devices[self._parts.part_of[node.name]]

    def _call(self, node: fx.Node, device: int) -> fx.Node:
        made = copy_node(self._made, node, lambda source: self._value(source, device))
        if creates_tensor(node):
            made.update_kwarg("device", self._places[device])
        self._home.setdefault(node, device)
        self._at[node, device] = made
        return made

    def _value(self, node: fx.Node, device: int) -> fx.Node:
        """A value on a device."""
        if (node, device) in self._at:
            return self._at[node, device]
        if node.op == "get_attr":
            found = self._attribute(node, device)
        elif node.name in self._parts.constants and node.op == "call_function":
            found = self._call(node, device)
        else:
            home = self._home[node]
            found = self._at[node, -1 if home is None else home]
            if isinstance(node.meta.get("val"), torch.Tensor):
                found = self._made.call_function(_moved, (found, self._places[device]))
                found.meta = dict(node.meta)
        self._at[node, device] = found
        return found

    def _attribute(self, node: fx.Node, device: int) -> fx.Node:
        name = self._program.ties.get(str(node.target), str(node.target))
        attribute = f"device{device}_{len(self._attributes)}"
        self._attributes[attribute] = name, device
        made = self._made.create_node("get_attr", attribute)
        made.meta = dict(node.meta)
        return made

    def _returned(self, node: fx.Node) -> fx.Node:
        home = self._home.get(node, 0)
        return self._at[node, -1] if home is None else self._value(node, home)


def _moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The value on a device, itself if it is there."""
    return value.to(device)


def free_bytes(device: torch.device) -> int:
    """The bytes that are free on a device; of the host's memory the share that weights may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return memory_budget()


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise InputError(f"devices= names {name!r}, which is not there: {line[:200]}") from error
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device
