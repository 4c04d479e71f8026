"""Runs the steps of a graph one by one, on values or on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx

from bmgraph.ir.evaluation import COMPUTED, arguments, value_of
from bmgraph.runtime.torch.stream.schedule import Use
from bmgraph.runtime.torch.stream.steps import Step, Steps
from bmgraph.utils.torch_internals import OpOverload, python_body


class Weights(Protocol):
    """Gives the values of streamed weights to a run."""

    def take(self, use: Use) -> torch.Tensor:
        """The rows of a use."""

    def drop(self, use: Use) -> None:
        """The last step that needs a use has run."""

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows of a tensor that ids i64[N] name."""


class StepRun:
    """One run: `values` holds the inputs at first, and what steps computed and later ones read.

    `simulated`: tensors have no data, and custom operators run as what they are made of, whose memory is seen then.
    """

    def __init__(
        self, steps: Steps, values: dict[fx.Node, Any], weights: Weights, held: Mapping[str, torch.Tensor], simulated: bool
    ) -> None:  # fmt: skip
        self._steps, self._values, self._weights, self._held = steps, values, weights, held
        self._simulated = simulated
        self._taken: dict[Use, torch.Tensor] = {}

    def step(self, index: int) -> None:
        """Run a step, and drop what it was the last to read."""
        step = self._steps.steps[index]
        if step.node in self._steps.looked_up:
            self._look_up(step.node)
        elif step.node in self._steps.products:
            self._multiply(step, index)
        else:
            self._values[step.node] = self._call(step.node, lambda item: self._value(item, index))
        for use in self._steps.ending.get(index, ()):
            del self._taken[use]
            self._weights.drop(use)
        for item in self._steps.last_read.get(index, ()):
            self._values.pop(item, None)

    def _value(self, item: fx.Node, index: int) -> Any:
        return self._tensor(str(item.target), index) if item.op == "get_attr" else self._values[item]

    def _tensor(self, name: str, index: int) -> torch.Tensor:
        use = self._steps.at.get((index, name))
        if use is None:
            return self._held[name]
        if use not in self._taken:
            self._taken[use] = self._weights.take(use)
        return self._taken[use]

    def _look_up(self, node: fx.Node) -> None:
        table, source, *_ = node.args
        ids = self._values[source]  # type: ignore[index]
        if self._simulated:
            unique, places = ids.reshape(-1), ids
        else:
            unique, places = ids.cpu().unique(return_inverse=True)  # their rows are read from files
            places = places.to(ids.device)
        rows = {}
        for leaf in self._steps.products[node]:
            name, count = str(leaf.target), int(leaf.meta["val"].shape[0])
            if not self._simulated and len(unique) and not 0 <= int(unique[0]) <= int(unique[-1]) < count:
                raise IndexError(
                    f"ids from {int(unique[0])} to {int(unique[-1])} for the {count} rows of {name!r}"
                )
            rows[name] = (
                self._held[name][unique.to(ids.device)]
                if name in self._held
                else self._weights.rows(name, unique)
            )
        self._values[node] = torch.nn.functional.embedding(places, self._rows_of(table, rows))

    def _multiply(self, step: Step, index: int) -> None:
        node, leaves = step.node, self._steps.products[step.node]
        x, weight, *rest = node.args
        bias: Any = rest[0] if rest else node.kwargs.get("bias")
        rows = step.rows
        total = int(leaves[0].meta["val"].shape[0])

        def part(name: str) -> torch.Tensor:
            found = self._tensor(name, index)
            return found if rows is None or (index, name) in self._steps.at else found[rows[0] : rows[1]]

        given = None if bias is None else self._value(bias, index)
        if given is not None and rows is not None:
            given = given[rows[0] : rows[1]]
        found = torch.nn.functional.linear(
            self._value(x, index),  # type: ignore[arg-type]
            self._rows_of(weight, {str(leaf.target): part(str(leaf.target)) for leaf in leaves}),
            given,
        )
        if rows is None:
            self._values[node] = found
            return
        if rows[0] == 0:
            self._values[node] = found.new_empty((*found.shape[:-1], total))
        self._values[node][..., rows[0] : rows[1]] = found

    def _rows_of(self, expression: Any, leaf: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The value of a row expression, given its leaves for the same rows."""

        def known(item: fx.Node) -> Any:
            return leaf[str(item.target)] if item.op == "get_attr" else COMPUTED

        if not self._simulated or expression.op == "get_attr":
            found: torch.Tensor = value_of(expression, known)
            return found
        values = {item: self._rows_of(item, leaf) for item in expression.all_input_nodes}
        made: torch.Tensor = self._call(expression, values.__getitem__)
        return made

    def _call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        args, kwargs = arguments(node, value)
        assert callable(node.target)
        if self._simulated and isinstance(node.target, OpOverload):
            body = python_body(f"{node.target.namespace}::{node.target.overloadpacket.__name__}")
            if body is not None:
                try:
                    return body(*args, **kwargs)
                except Exception:  # it asks for values: what it takes inside is then not seen
                    pass
        return node.target(*args, **kwargs)
