"""Proves a prefix by other means than its rewrite: the program before it, run with tokens in front whose keys and values are replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.analysis.token_values import SEQUENCE_AXIS, TokenValues, ids_of, token_values
from bmgraph.deltas.prefix import PrefixFamily, without_prefix
from bmgraph.deltas.prefix_sites import joins_of, kept_by
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import role_of
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims, expression
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.verify.proof import Proof, random_like
from bmgraph.verify.reference_outputs import Batch

aten = torch.ops.aten

SLACK = 10
"""How much more than rounding values may differ: sums over more positions have another order."""

DEPTH = 8
"""How many calls lie between keys as they are computed and an attention, at most."""

HOLDS = {InputKind.MASK: 1, InputKind.INVERSE_MASK: 0}


def check_prefix(before: Program, after: Program, proof: Proof) -> None:
    """Raise VerificationError where attentions behind a prefix, or outputs along the sequence, are not what the program computes
    for a text with as many tokens in front, if the prefix takes the place of these tokens' keys and values.

    Its values are random ones, since fresh ones may hide faults. A decoder whose ids are computed is not compared.
    """
    found = after.clone()
    for salt, node in enumerate(item for item in found.graph.nodes if item.op == "get_attr"):
        name = str(node.target)
        if role_of(node) in PrefixFamily.roles:
            found.parameters[name] = random_like(found.parameters[name], 0.5, salt)
    symbols = {str(dims(after, kept_by(join).meta["val"])[SEQUENCE_AXIS]) for join in joins_of(after.graph)}
    for length in symbols:
        _check_sequence(before, found, length, proof)


def _check_sequence(before: Program, found: Program, length: str, proof: Proof) -> None:
    nodes = {node.name: node for node in before.graph.nodes}
    _, values = without_prefix(found)
    values = {
        name: value
        for name, value in values.items()
        if dims(before, nodes[name].meta["val"])[SEQUENCE_AXIS] == length
    }
    symbol = expression(nodes[next(iter(values))].meta["val"].shape[SEQUENCE_AXIS])
    tokens = token_values(before, symbol)
    kinds = {spec.name: spec.kind for spec in before.inputs}
    if not _reads_inputs(before, tokens):
        return
    count = next(int(value.shape[SEQUENCE_AXIS]) for value in values.values())
    expected = _with_values(before, values, count)
    if not _hidden_from_others(expected, values, tokens, count):
        return

    def longer(batch: Batch) -> dict[str, torch.Tensor]:
        return {
            name: _longer(value, kinds[name], count) if name in along else value
            for name, value in batch.items()
        }

    def text(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for spec in expected.outputs:
            for axis, dim in enumerate(spec.shape):
                if dim == length:
                    value = outputs[spec.name]
                    outputs[spec.name] = value.narrow(axis, count, value.shape[axis] - count)
        return outputs

    along = {str(node.target) for node in tokens.inputs}
    names = [core.node.name for core in walk(before.graph).cores if core.node in tokens.values]
    expected, seen = _seen(expected, names, length), _seen(found, names, length)
    what = "attention does not compute what it does behind as many tokens whose keys and values are replaced"
    proof.same_values(expected, seen, longer, text, what, SLACK)


def _hidden_from_others(
    program: Program, values: dict[str, torch.Tensor], tokens: TokenValues, count: int
) -> bool:
    """Hide the tokens in front from the attentions over the sequence that have no prefix, in place; False where one of them is
    written out."""
    named = {node.name for node in tokens.values}
    for core in walk(program.graph).cores:
        if core.node.name not in named or any(item.name in values for item in upstream_of_keys(core)):
            continue
        if core.k.name not in named:
            continue  # it reads another sequence
        if core.scores is not None:
            return False
        with program.graph.inserting_before(core.node):
            call = program.graph.call_function
            keys, own = (
                call(aten.slice.Tensor, (item, SEQUENCE_AXIS, count, END)) for item in (core.k, core.v)
            )
            mask: Any = core.mask
            if core.is_causal:
                size = call(aten.sym_size.int, (core.k, SEQUENCE_AXIS))
                places = call(aten.arange.default, (size,))
                mask = call(aten.ge.Tensor, (call(aten.unsqueeze.default, (places, 1)), places))
            if mask is not None:
                mask = call(aten.slice.Tensor, (mask, -1, count, END))
            for made in (keys, own):
                made.meta["val"] = core.k.meta["val"]
        core.node.args = (core.node.args[0], keys, own, mask, 0.0, False, *core.node.args[6:])
        core.node.kwargs = {
            key: value for key, value in core.node.kwargs.items() if key in ("scale", "enable_gqa")
        }
    return True


def upstream_of_keys(core: Core) -> list[fx.Node]:
    """The keys of an attention, and what they were widened or joined from."""
    found = [core.k]
    while found[-1].op == "call_function" and found[-1].all_input_nodes and len(found) < DEPTH:
        first: Any = found[-1].args[0]
        following = first[-1] if isinstance(first, (list, tuple)) else first
        if not isinstance(following, fx.Node):
            break
        found.append(following)
    return found


def _reads_inputs(program: Program, tokens: TokenValues) -> bool:
    """Whether tokens are looked up as inputs give them, or are inputs."""
    lookups = [node for node in walk(program.graph).embeddings if node in tokens.values]
    return all(ids_of(node) in tokens.inputs for node in lookups)


def _longer(value: torch.Tensor, kind: InputKind | None, count: int) -> torch.Tensor:
    """An input with as many positions in front, as the user would write them."""
    column = value[:, :1].expand(-1, count, *value.shape[2:])
    if kind is InputKind.POSITIONS:
        return torch.cat([torch.arange(count).expand(len(value), -1).to(value), value + count], 1)
    if kind in HOLDS:
        column = torch.full_like(column, HOLDS[kind])
    return torch.cat([column, value], 1)


def _with_values(program: Program, values: dict[str, torch.Tensor], count: int) -> Program:
    """A copy in which the first keys and values, by the name of their node, are replaced."""
    copy = program.clone()
    for node in list(copy.graph.nodes):
        value = values.get(node.name)
        if value is None:
            continue
        name = f"replaced.{node.name}"
        copy.parameters[name] = value
        with copy.graph.inserting_after(node):
            front = copy.graph.get_attr(name)
        with copy.graph.inserting_after(front):
            rows = copy.graph.call_function(aten.sym_size.int, (node, 0))
        with copy.graph.inserting_after(rows):
            wide = copy.graph.call_function(aten.expand.default, (front, [rows, -1, -1, -1]))
        with copy.graph.inserting_after(wide):
            rest = copy.graph.call_function(aten.slice.Tensor, (node, SEQUENCE_AXIS, count, END))
        with copy.graph.inserting_after(rest):
            joined = copy.graph.call_function(aten.cat.default, ([wide, rest], SEQUENCE_AXIS))
        node.replace_all_uses_with(joined, delete_user_cb=lambda user: user not in (rows, rest))  # noqa: B023
        for made in (front, rows, wide, rest, joined):
            made.meta["val"] = node.meta["val"]
    return copy


def _seen(program: Program, names: list[str], length: str) -> Program:
    """A copy that returns what the attentions of these names give, and the outputs along the sequence."""
    copy = program.clone()
    nodes = {node.name: node for node in copy.graph.nodes}
    output = output_node(copy.graph)
    values: Any = output.args[0]
    kept = [(spec, node) for spec, node in zip(copy.outputs, values) if length in spec.shape]
    for index, name in enumerate(names):
        value = nodes[name].meta["val"]
        kept.append((TensorSpec(f"attention_{index}", value.dtype, dims(copy, value)), nodes[name]))
    output.args = ((*(node for _, node in kept), *values[len(copy.outputs) :]),)
    copy.outputs = tuple(spec for spec, _ in kept)
    copy.losses = ()
    return copy
