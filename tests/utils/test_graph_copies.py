"""Copies of nodes and graphs are those that torch makes."""

from __future__ import annotations

import operator

import torch
from torch import fx

from bmgraph.utils.graph_copies import copy_node, copy_nodes


def graph() -> fx.Graph:
    built = fx.Graph()
    x = built.placeholder("x")
    weight = built.get_attr("weight")
    total = built.call_function(torch.add, (x, weight), {"alpha": 2})
    parts = built.call_function(torch.stack, ([total, x],), {"dim": 0})
    parts.meta["scope"] = "block"
    part = built.call_function(operator.getitem, (parts, slice(0, 1, None)))
    built.output((part, {"x": x}))
    return built


def test_a_copied_graph_is_torchs_copy() -> None:
    source, mine, theirs = graph(), fx.Graph(), fx.Graph()
    mine.output(copy_nodes(mine, source, {}))
    theirs.output(theirs.graph_copy(source, {}))
    assert str(mine) == str(theirs)
    mine.lint()
    for one, other, first in zip(mine.nodes, theirs.nodes, source.nodes):
        assert (one.name, one.op, one.target, one.meta) == (other.name, other.op, other.target, other.meta)
        assert [user.name for user in one.users] == [user.name for user in other.users]
        assert one.op == "output" or (one.meta == first.meta and one.meta is not first.meta)


def test_nodes_that_have_a_copy_are_not_copied_again() -> None:
    source, mine = graph(), fx.Graph()
    x, weight = list(source.nodes)[:2]
    given = mine.placeholder("given")
    mine.output(copy_nodes(mine, source, {x: given, weight: given}))
    assert [node.op for node in mine.nodes] == ["placeholder", *["call_function"] * 3, "output"]
    taken = copy_node(mine, list(source.nodes)[2], lambda node: given)
    assert taken.args == (given, given)
    assert taken.kwargs == {"alpha": 2}
