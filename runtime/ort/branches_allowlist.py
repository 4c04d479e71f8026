"""Check the branches of an If: two graphs of plain nodes that give a value each, and nothing within them branches again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmgraph.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from onnx import GraphProto, NodeProto

NAMES = ("else_branch", "then_branch")


def branches(node: NodeProto) -> list[GraphProto]:
    """The branches of an If; none of another node."""
    return [item.g for item in node.attribute if item.HasField("g")] if node.op_type == "If" else []


def check_branches(node: NodeProto) -> None:
    """Raise BundleError for an If that is not of the form that our backend writes: a branch reads values of the graph around it
    and has neither inputs nor weights of its own."""
    if node.op_type != "If":
        return
    where = f"node {node.name!r} (If)"
    if tuple(sorted(item.name for item in node.attribute)) != NAMES or len(branches(node)) != len(NAMES):
        raise BundleError(f"{where} does not have two branches alone")
    if len(node.output) != 1:
        raise BundleError(f"{where} gives {len(node.output)} values: expected one")
    for branch in branches(node):
        if branch.input or branch.initializer or branch.sparse_initializer or len(branch.output) != 1:
            raise BundleError(
                f"{where} has a branch with inputs or weights of its own, or with other than one output"
            )
        inner = next((item for item in branch.node if item.op_type == "If"), None)
        if inner is not None:
            raise BundleError(f"{where} has a branch that branches again, in node {inner.name!r}")


def check_condition(node: NodeProto, made: Mapping[str, NodeProto], dynamic: Collection[str]) -> None:
    """Raise BundleError unless the condition of an If compares a number of elements that only a call knows.

    `made`: the node that makes a value, by the value's name; `dynamic`: the values whose sizes depend on inputs.
    """
    compared = made.get(node.input[0])
    counted = (
        made.get(compared.input[0]) if compared is not None and compared.op_type == "LessOrEqual" else None
    )
    if counted is None or counted.op_type != "Size" or counted.input[0] not in dynamic:
        raise BundleError(
            f"node {node.name!r} (If) does not choose by the number of elements of an input or of what is made of it"
        )
