"""The graph of a step of one token beside the program's own, in whatever form its attention is given a mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

import bmgraph as bg
from bmgraph.ir.eval_form import runnable
from bmgraph.ir.program import Program
from bmgraph.lowering.one_token_step import ATTENTION, one_token_step
from bmgraph.passes import KVCache
from tests.helpers.captured import captured

aten = torch.ops.aten


@pytest.fixture(scope="module")
def cached() -> Program:
    return bg.Pipeline([KVCache()]).run(captured("llama")[1], verify="off")


def as_it_is(graph: fx.Graph, node: fx.Node) -> None:
    """The mask [B, 1, S, T] by its place."""


def by_name(graph: fx.Graph, node: fx.Node) -> None:
    """The mask by its name."""
    query, key, value, mask = node.args
    node.args, node.kwargs = (query, key, value), {**node.kwargs, "attn_mask": mask}


def of_heads(graph: fx.Graph, node: fx.Node) -> None:
    """A mask [B, heads, S, T]."""
    mask, heads = node.args[3], node.meta["val"].shape[1]
    assert isinstance(mask, fx.Node)
    with graph.inserting_before(node):
        whole = graph.call_function(aten.expand.default, (mask, [-1, heads, -1, -1]))
    whole.meta["val"] = mask.meta["val"].expand(-1, heads, -1, -1)
    node.update_arg(3, whole)


def of_heads_alone(graph: fx.Graph, node: fx.Node) -> None:
    """A mask [heads, S, T], for a batch of one row."""
    of_heads(graph, node)
    whole = node.args[3]
    assert isinstance(whole, fx.Node)
    with graph.inserting_before(node):
        first = graph.call_function(aten.select.int, (whole, 0, 0))
    first.meta["val"] = whole.meta["val"][0]
    node.update_arg(3, first)


@pytest.mark.parametrize("form", [as_it_is, by_name, of_heads, of_heads_alone])
def test_a_step_of_one_token_gives_what_the_program_gives(
    cached: Program, form: Callable[[fx.Graph, fx.Node], None]
) -> None:
    program = cached.clone()
    attentions = [node for node in program.graph.nodes if node.target is ATTENTION]
    for node in attentions:
        form(program.graph, node)
    step = one_token_step(program)
    assert step is not None
    assert len(step.masks) == (1 if form in (as_it_is, by_name) else len(attentions))
    assert program.cache is not None
    cache = program.cache.spec(program)
    assert cache.mask is not None
    assert cache.scored is not None
    rows, held = 1 if form is of_heads_alone else 2, 5
    sizes = cache.sizes_of_step(rows, held)
    torch.manual_seed(0)
    past, room = {}, {}
    for slot in cache.slots:
        value = torch.randn([sizes[dim] if isinstance(dim, str) else dim for dim in slot.past.shape])
        past[slot.past.name] = value
        room[slot.past.name] = torch.cat([value, torch.full_like(value[:, :, :1], 9.0)], slot.axis)
    mask = torch.ones(rows, held + 1, dtype=cache.mask.dtype)
    mask[-1, :2] = 0
    given = {
        cache.tokens.name: torch.tensor([[3], [7]])[:rows],
        cache.mask.name: mask,
        cache.scored.name: torch.zeros(1, dtype=torch.int64),
    }

    def run(module: torch.nn.Module, parts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return list(module(*({**given, **parts}[spec.name] for spec in program.inputs)))

    expected, found = run(program.module(), past), run(runnable(program, step.graph, False), room)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
