"""Finds the head of a step with its cross-entropy in forward and backward, and whatever else reads its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.errors import PassError
from bmgraph.training.step_program import TENSOR, StepProgram

aten = torch.ops.aten
collective = torch.ops._c10d_functional

SUM = 2
"""torch's code for a loss that is summed."""
RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)
CUTS = (aten.slice.Tensor, aten.view.default)
GATHERS = (collective.all_gather_into_tensor.default, collective.wait_tensor.default)
JOINS = (
    aten.cat.default, collective.reduce_scatter_tensor.default, collective.all_reduce.default,
    collective.wait_tensor.default,
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """logits [T, V] = hidden [T, D] @ table[V, D].T, their summed cross-entropy with `target` i64[T], and its backward."""

    bucket: str
    """The name of the table's tensor in the step."""
    hidden: fx.Node
    target: fx.Node
    ignored: int
    logits: fx.Node
    forward: fx.Node
    """The loss (total, weight of all targets)."""
    total: fx.Node
    d_logits: fx.Node
    """The gradient of the log-probabilities."""
    d_hidden: fx.Node
    d_table: fx.Node
    factor: fx.Node | None
    """The gradient of the total, if it is not one."""


@dataclass(frozen=True)
class Readers:
    """What reads the table besides the head: lookups, and their terms of the table's gradient; `summed` joins all terms."""

    lookups: tuple[fx.Node, ...]
    gradients: tuple[fx.Node, ...]
    summed: fx.Node


def find_head(step: StepProgram) -> Head:
    """The only head of a step. Raises PassError, which says why, if there is none that can be split."""
    losses = [node for node in step.graph.nodes if node.target is aten.nll_loss_backward.default]
    if len(losses) != 1:
        raise _unfit(f"the step has {len(losses)} cross-entropies over classes, not one")
    (d_logits,) = losses
    factor, log_probabilities, _, weight, reduction, ignored, _ = d_logits.args
    if weight is not None or reduction != SUM:
        raise _unfit("its cross-entropy has class weights, or is no mean that is split into sum and count")
    backward = _only(_users(log_probabilities), aten._log_softmax_backward_data.default, "label smoothing")
    forward = _only(_users(log_probabilities), aten.nll_loss_forward.default, "label smoothing")
    if len(log_probabilities.users) != 3:  # these two and d_logits
        raise _unfit("its cross-entropy has label smoothing, or something else reads the log-probabilities")
    target: Any = forward.args[1]
    logits = _behind(log_probabilities.args[0], RESHAPES)
    if logits.target is not aten.mm.default:
        raise _unfit(f"its logits come from {logits.target}, not from one linear without a bias")
    hidden, turned = _operands(logits)
    if turned.target is not aten.t.default:
        raise _unfit("its logits are not a product with a table of rows")
    bucket = _bucket_of(turned.args[0])
    if bucket is None or bucket not in step.updates:
        raise _unfit("the table of its logits does not train, or is computed")
    place = step.places[bucket]
    if len(place.pieces) != 1 or len(place.pieces[0].shape) != 2:
        raise _unfit(f"its table lies in one bucket with others: {', '.join(place.names[:3])}")
    if logits.meta["val"].dtype != torch.float32 or place.dtype != torch.float32:
        raise _unfit("its logits or its table are not float32")
    d_hidden, d_table = _products(backward, hidden)
    (total,) = [user for user in forward.users if user.args[1] == 0]
    scale = None if _is_one(factor) else factor
    if scale is not None and not _is_constant(scale):
        raise _unfit("its loss is scaled by a number that is computed")
    assert isinstance(ignored, int)
    return Head(bucket, hidden, target, ignored, logits, forward, total, d_logits, d_hidden, d_table, scale)  # type: ignore[arg-type]


def find_readers(step: StepProgram, head: Head) -> Readers:
    """What else reads the table of a head; raises PassError if it is no lookup, or its gradient is not one of these."""
    lookups = []
    for reader in _leaves(step.reads()[head.bucket]):
        if reader.target is aten.embedding.default:
            lookups.append(reader)
        elif reader is not head.d_hidden and not (
            reader.target is aten.t.default and set(reader.users) <= {head.logits}
        ):
            raise _unfit(f"its table is also read by {reader.target} at {reader.meta.get('scope')!r}")
    joined = step.gradients()[head.bucket]
    while joined.target in JOINS:
        source: Any = joined.args[0]
        joined = source[0] if isinstance(source, (list, tuple)) else source
    summed = _behind(joined, RESHAPES) if joined.target in RESHAPES else joined
    gradients = []
    for term in _terms(summed):
        if term.target is aten.embedding_dense_backward.default and not term.args[4]:
            gradients.append(term)
        elif term is not head.d_table:
            raise _unfit(f"the gradient of its table has a term of {term.target}")
    return Readers(tuple(lookups), tuple(gradients), joined)


def erase_dead(graph: fx.Graph, roots: Sequence[fx.Node]) -> None:
    """Erase calls that nothing reads any more, and what was computed for them alone."""
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node.users or node.op != "call_function" or node.graph is not graph or node._erased:
            continue
        sources = node.all_input_nodes
        readers = [user for source in sources for user in source.users if user is not node]
        graph.erase_node(node)
        stack += sources
        stack += [reader for reader in readers if not reader.users]


def _unfit(reason: str) -> PassError:
    return PassError(f"ParallelHead does not apply: {reason}")


def _operands(node: fx.Node) -> tuple[Any, Any]:
    first, second = node.args
    return first, second


def _users(node: fx.Node) -> list[fx.Node]:
    return list(node.users)


def _only(nodes: Sequence[fx.Node], target: Any, instead: str) -> fx.Node:
    found = [node for node in nodes if node.target is target]
    if len(found) != 1:
        raise _unfit(f"its cross-entropy has {instead}, or something else reads the log-probabilities")
    return found[0]


def _behind(node: Any, targets: Sequence[Any]) -> fx.Node:
    while node.target in targets:
        node = node.args[0]
    found: fx.Node = node
    return found


def _bucket_of(node: Any) -> str | None:
    """The tensor of the step that a node is a view of, gathered or not."""
    source = _behind(_behind(node, CUTS), GATHERS)
    return str(source.meta[TENSOR]) if TENSOR in source.meta else None


def _products(backward: fx.Node, hidden: Any) -> tuple[fx.Node, fx.Node]:
    """The gradients of the hidden states and of the table, by the only two readers of the logits' gradient."""
    readers = [reader for reader in _leaves(backward, RESHAPES) if reader.target is not aten.sym_size.int]
    products = [node for node in readers if node.target is aten.mm.default]
    turned = [user for node in readers if node.target is aten.t.default for user in node.users]
    if len(readers) != 2 or len(products) != 1 or len(turned) != 1:
        raise _unfit("something besides the two products of its backward reads the gradient of its logits")
    if turned[0].target is not aten.mm.default or not _same_value(turned[0].args[1], hidden):
        raise _unfit("the gradient of its table is not one product with the hidden states")
    return products[0], turned[0]


def _same_value(one: Any, other: Any) -> bool:
    """Whether two arguments are the same node, or the same calls on the same nodes: a value that is computed again."""
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
            return len(one) == len(other) and all(map(_same_value, one, other))
        return bool(type(one) is type(other) and one == other)
    if one is other:
        return True
    is_call = one.op == other.op == "call_function" and one.target is other.target
    drawn = torch.Tag.nondeterministic_seeded in getattr(one.target, "tags", ())
    keys = one.kwargs.keys() == other.kwargs.keys()
    return (
        is_call
        and not drawn
        and keys
        and _same_value(one.args, other.args)
        and all(_same_value(one.kwargs[key], other.kwargs[key]) for key in one.kwargs)
    )


def _leaves(node: fx.Node, through: Sequence[Any] = (*CUTS, *GATHERS)) -> list[fx.Node]:
    """The readers of a node behind its views."""
    found: dict[fx.Node, None] = {}
    for user in node.users:
        if user.target in through:
            found |= dict.fromkeys(_leaves(user, through))
        elif user.op != "output":
            found[user] = None
    return list(found)


def _terms(node: fx.Node) -> list[fx.Node]:
    """The terms of a sum that is read only here."""
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        return [term for argument in node.args for term in _terms(argument)]  # type: ignore[arg-type]
    return [node]


def _is_one(node: Any) -> bool:
    return bool(node.target is aten.ones_like.default)


def _is_constant(node: Any) -> bool:
    """Whether a gradient of the loss is the same number on all ranks: made of ones and of numbers in the graph."""
    if _is_one(node):
        return True
    scaled = node.target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
    nodes = node.all_input_nodes
    return bool(scaled and len(nodes) == 1 and _is_constant(nodes[0]))
