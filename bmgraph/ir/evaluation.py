"""Evaluates calls, expressions and graphs, whatever stands for their values: tensors, fake tensors, sizes or labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import fx, nn

Visit = Callable[[str, torch.Tensor], None]
"""Callback: receives the node's name and its value."""


class Computed:
    """The type of `COMPUTED`."""


COMPUTED: Final = Computed()
"""Returned for a node whose value is to be computed from those of its arguments."""


def arguments(node: fx.Node, value: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by place and by name, with `value(argument)` in place of nodes."""
    args: Any = fx.map_arg(node.args, value)
    return tuple(args), dict(fx.map_arg(node.kwargs, value))


def run_call(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """What a call returns for the argument values that `value` gives."""
    assert callable(node.target)
    args, kwargs = arguments(node, value)
    return node.target(*args, **kwargs)


def value_of(node: fx.Node, leaf: Callable[[fx.Node], Any]) -> Any:
    """The value of an expression; `leaf` gives the values where it begins, and COMPUTED elsewhere."""
    values: dict[fx.Node, Any] = {}
    stack = [(node, False)]
    while stack:
        item, ready = stack.pop()
        if ready:
            values[item] = run_call(item, values.__getitem__)
        elif item not in values:
            found = leaf(item)
            if found is COMPUTED:
                stack.append((item, True))
                stack.extend((source, False) for source in item.all_input_nodes)
            else:
                values[item] = found
    return values[node]


def upstream(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it is computed from, each once; walked only as far as it is asked for."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        item = stack.pop()
        if item not in seen:
            seen.add(item)
            yield item
            stack.extend(item.all_input_nodes)


class GraphRunner(fx.Interpreter):
    """Runs a graph on given tensors, and shows the values of the nodes in `names` to `visit` as soon as they are computed.

    No value is kept after its last use.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, torch.Tensor],
        names: frozenset[str] = frozenset(),
        visit: Visit | None = None,
    ) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.extra_traceback = False  # else the traceback is appended to our own error messages
        self._tensors = tensors
        self._names = names
        self._visit = visit

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """A tensor of the program, by its name."""
        return self._tensors[str(target)]

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        result = super().run_node(n)
        if self._visit is not None and n.name in self._names and isinstance(result, torch.Tensor):
            self._visit(n.name, result)
        return result
