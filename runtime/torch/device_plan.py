"""Chooses on which device each part of a graph runs, by the bytes that its weights, cache and activations take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.structure.layer_parts import cut_at_layers
from bmgraph.errors import BackendError
from bmgraph.ir.evaluation import run_call
from bmgraph.ir.program import Program
from bmgraph.training.liveness import fakes_of, last_reads, storages_of
from bmgraph.utils.torch_internals import planning_mode, python_dispatcher


@dataclass(frozen=True)
class Load:
    """What one part of a graph takes: its weights in bytes by name, what it holds to the end (inputs and outputs, such as a KV
    cache), and the most bytes of activations at a time, beside these."""

    weights: dict[str, int]
    held: int
    activations: int


@dataclass(frozen=True)
class Share:
    """What runs on one device: the parts from `begin` to before `end`, and the bytes that they take."""

    begin: int
    end: int
    weights: int
    held: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.held + self.activations


@dataclass(frozen=True)
class Parts:
    """A graph in parts that run one after the other: the part of each node by name, and the constants, which are computed where
    they are read."""

    part_of: dict[str, int]
    constants: frozenset[str]
    count: int


def parts_of(program: Program, least: int) -> Parts:
    """The parts of the entry: layers and what lies between them; single calls where that gives fewer than `least`."""
    cut = cut_at_layers(program)
    part_of = {node.name: part for node, part in cut.part_of.items()}
    constants = frozenset(node.name for node in cut.constants)
    if len(cut.layers) < least:
        calls = [
            node for node in program.graph.nodes if node.op == "call_function" and node.name not in constants
        ]
        part_of = {node.name: number for number, node in enumerate(calls)}
    return Parts(part_of, constants, max(part_of.values(), default=0) + 1)


def loads_of(program: Program, graph: fx.Graph, parts: Parts) -> list[Load]:
    """What each part takes on the program's example, simulated without data; `graph` is its eval form.

    What crosses into a part counts where it was made, and what only constants are computed from where these are read.
    """
    weights: list[dict[str, int]] = [{} for _ in range(parts.count)]
    for node in graph.nodes:
        if node.op == "get_attr":
            name = program.ties.get(str(node.target), str(node.target))
            for part in _readers(node, parts):
                weights[part][name] = program.tensor(name).nbytes
    held, activations = _activations(program, graph, parts)
    return [Load(*item) for item in zip(weights, held, activations)]


def _readers(node: fx.Node, parts: Parts) -> set[int]:
    """The parts that read a value, also through constants."""
    found, stack, seen = set[int](), list(node.users), set[fx.Node]()
    while stack:
        user = stack.pop()
        if user in seen or user.op != "call_function":
            continue
        seen.add(user)
        if user.name in parts.constants:
            stack.extend(user.users)
        else:
            found.add(parts.part_of[user.name])
    return found or {0}


def _activations(program: Program, graph: fx.Graph, parts: Parts) -> tuple[list[int], list[int]]:
    """For each part the bytes that are held to the end, and the peak of others, on the program's example."""
    held, peak = [0] * parts.count, [0] * parts.count
    if any(spec.name not in program.example for spec in program.inputs):
        return held, peak
    mode = planning_mode()
    names = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    tensors = fakes_of({name: program.tensor(name) for name in names}, mode)
    inputs = iter(fakes_of({spec.name: program.example[spec.name] for spec in program.inputs}, mode).values())
    dying, values, live = last_reads(graph), dict[fx.Node, object](), dict[int, tuple[int, int]]()
    readers, now = dict[int, int](), [0] * parts.count
    own = storages_of(tuple(tensors.values()))
    with mode, python_dispatcher(), torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                break
            if node.op == "get_attr":
                values[node] = tensors[str(node.target)]
                continue
            value = next(inputs) if node.op == "placeholder" else run_call(node, values.__getitem__)
            values[node] = value
            part = min(_readers(node, parts)) if node.op == "placeholder" else parts.part_of.get(node.name, 0)
            for key, size in storages_of(value).items():
                if key not in own:
                    if key not in live:
                        live[key] = part, size
                        now[part] += size
                    readers[key] = readers.get(key, 0) + 1
            peak[part] = max(peak[part], now[part])
            for last in dying.get(node, ()):
                if last.op != "get_attr":
                    for part, size in _released(values.pop(last), readers, live):
                        now[part] -= size
    for part, size in live.values():  # what is returned
        held[part] += size
        peak[part] -= size
    return held, [max(0, size) for size in peak]


def _released(
    value: object, readers: dict[int, int], live: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """The part and the bytes of the storages that nobody reads after this value."""
    for key in storages_of(value):
        if key in readers:
            readers[key] -= 1
            if not readers[key]:
                del readers[key]
                yield live.pop(key)


def shares_of(loads: Sequence[Load], capacities: Sequence[int]) -> list[Share]:
    """Divide parts among devices in order, so that the fullest device is as empty as can be, relative to its capacity in bytes.

    Raises BackendError where a device is too small.
    """
    low, high = 0.0, 1.0
    best = _filled(loads, capacities, high)
    if best is None:
        needed = _share(loads, 0, len(loads)).total
        raise BackendError(
            f"devices= have {', '.join(f'{size / 1e6:,.1f} MB' for size in capacities)} free, and the program takes {needed / 1e6:,.1f} "
            "MB in parts that do not fit into them: give more devices, or make the program smaller, such as by Quantize"
        )
    for _ in range(40):
        middle = (low + high) / 2
        found = _filled(loads, capacities, middle)
        if found is None:
            low = middle
        else:
            high, best = middle, found
    return best


def _filled(loads: Sequence[Load], capacities: Sequence[int], fill: float) -> list[Share] | None:
    """Fill each device up to a share of its capacity, in order; None if parts are left."""
    found, begin = list[Share](), 0
    for capacity in capacities:
        end, limit = begin, fill * capacity
        last = _share(loads, begin, begin)
        while end < len(loads):
            more = _share(loads, begin, end + 1)
            if more.total > limit:
                break
            end, last = end + 1, more
        found.append(last)
        begin = end
    return found if begin == len(loads) else None


def _share(loads: Sequence[Load], begin: int, end: int) -> Share:
    chosen = loads[begin:end]
    weights: dict[str, int] = {}
    for load in chosen:
        weights |= load.weights
    return Share(
        begin,
        end,
        sum(weights.values()),
        sum(load.held for load in chosen),
        max((load.activations for load in chosen), default=0),
    )


def part_device(shares: Iterable[Share]) -> dict[int, int]:
    """Part -> the number of its device."""
    return {part: number for number, share in enumerate(shares) for part in range(share.begin, share.end)}
