"""Inline the subgraphs that torch.export makes of `no_grad` and `autocast` blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.errors import CaptureError
from bmgraph.utils.graph_copies import copy_node

aten = torch.ops.aten

AUTOCAST_ENABLED = 2
"""The position of `enabled` among the arguments of wrap_with_autocast."""


def inline_regions(module: fx.GraphModule, node: fx.Node, graph: fx.Graph, values: dict[fx.Node, Any]) -> Any:
    """Copy the region that `node` calls into `graph`; returns its results, or None if `node` does not call a region.

    `values` maps nodes of the outer graph to their copies. What leaves a `no_grad` region is detached. Raises
    CaptureError if the region enables autocast.
    """
    name = getattr(node.target, "__name__", str(node.target))
    if name not in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
        return None
    if name == "wrap_with_autocast" and node.args[AUTOCAST_ENABLED] is True:
        raise CaptureError(
            "the model enables autocast inside forward: capture it in one precision, without autocast"
        )
    position = next(
        index for index, item in enumerate(node.args) if isinstance(item, fx.Node) and item.op == "get_attr"
    )
    holder = node.args[position]
    assert isinstance(holder, fx.Node)
    region = module.get_submodule(str(holder.target))
    assert isinstance(region, fx.GraphModule)
    no_grad = name == "wrap_with_set_grad_enabled" and node.args[0] is False
    inner: dict[fx.Node, Any] = {}
    arguments = iter(node.args[position + 1 :])
    for item in region.graph.nodes:
        if item.op == "placeholder":
            outer = next(arguments)
            inner[item] = values[outer] if isinstance(outer, fx.Node) else outer
        elif item.op == "output":
            result = fx.map_arg(item.args[0], lambda old: inner[old])
            return tuple(_detached(graph, value) if no_grad else value for value in _tuple(result))
        elif item.op == "get_attr":
            inner[item] = None
        else:
            nested = inline_regions(region, item, graph, inner)
            if nested is not None:
                inner[item] = nested
            elif getattr(item.target, "__name__", "") == "getitem" and isinstance(
                inner.get(item.args[0]), tuple
            ):
                inner[item] = inner[item.args[0]][item.args[1]]
            else:
                inner[item] = copy_node(graph, item, lambda old: inner[old])
    raise AssertionError("the region has no output")


def _tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _detached(graph: fx.Graph, value: Any) -> Any:
    """The value behind a `detach`, if it is a tensor that could have a gradient."""
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    if not value.meta["val"].is_floating_point():
        return value
    node = graph.call_function(aten.detach.default, (value,))
    node.meta = dict(value.meta)
    return node
