"""Adds and replaces nodes, inputs and parameters of a program, with their shapes and metadata."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import fx

from bmgraph.errors import PassError
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import KEY, known_role
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.shape_inference import carry, dim_text, fake_parameter, infer
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.utils.torch_internals import fake_mode_of


class Editor:
    """Edits the entry of a program, in place; obtain it from `program.edit()`.

    `by` is the text form of the pass that edits; all new nodes carry it as metadata.
    """

    def __init__(self, program: Program, by: str = "") -> None:
        self.program = program
        self.graph = program.graph
        self.by = by
        self._mode = fake_mode_of(list(self.graph.nodes))
        self._tensors = tensor_nodes(self.graph)

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        like: fx.Node,
        site: str = "",
        part: str = "",
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        named: str = "",
        **kwargs: Any,
    ) -> fx.Node:
        """Add a call before `like` (or at `before` or `after`), with the metadata of `like`, and infer its shape.

        `named`: what its node is called, with a number behind it where that is taken; by default as its operator.
        Raises PassError for arguments that the operator does not take.
        """
        if after is not None:
            scope = self.graph.inserting_after(after)
        else:
            scope = self.graph.inserting_before(before or like)
        with scope:
            node = self.graph.create_node("call_function", target, args, kwargs, named or None)
        if site:
            node.meta["site"] = site
        if part:
            node.meta[KEY] = known_role(part)
        if self.by:
            node.meta["pass"] = self.by
        carry(like, node)
        if self._mode is not None:
            try:
                infer(node, self._mode, self.program.device)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                said = _not_taken(node, error)
                self.graph.erase_node(node)
                raise PassError(said) from error
        return node

    def input(
        self,
        name: str,
        example: torch.Tensor,
        sizes: Sequence[int | torch.SymInt],
        names: tuple[str, ...] = (),
        kind: InputKind = InputKind.OTHER,
    ) -> fx.Node:
        """Add an input to the program, after the existing ones.

        `example` is its value in the program's example and sets its dtype, `sizes` are numbers or sizes of other nodes'
        values, `names` are the names that callers may give instead of indices, `kind` is what it holds. Raises PassError if
        the name is taken.
        """
        if any(spec.name == name for spec in self.program.inputs):
            raise PassError(f"the program has an input {name!r} already: choose another name")
        last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        if self._mode is not None:
            with self._mode:
                node.meta["val"] = torch.empty(tuple(sizes), dtype=example.dtype, device=self.program.device)
        if self.by:
            node.meta["pass"] = self.by
        shape = tuple(dim_text(self.program, size) for size in sizes)
        self.program.inputs = (*self.program.inputs, TensorSpec(name, example.dtype, shape, names, kind=kind))
        self.program.example[name] = example
        return node

    def parameter(
        self,
        name: str,
        tensor: torch.Tensor,
        *,
        like: fx.Node | None = None,
        frozen: bool = False,
        part: str = "",
    ) -> fx.Node:
        """Add a parameter and return the node that reads it; training does not change a `frozen` one.

        The name must be free: `fresh` finds one.
        """
        self._check_free(name)
        self.program.parameters[name] = tensor
        if frozen or not tensor.is_floating_point():
            self.program.frozen |= {name}
        return self._stamped(name, like, part)

    def buffer(
        self, name: str, tensor: torch.Tensor, *, like: fx.Node | None = None, part: str = ""
    ) -> fx.Node:
        """Add a buffer and return the node that reads it: what a step rule changes while the program trains.

        The name must be free: `fresh` finds one.
        """
        self._check_free(name)
        self.program.buffers[name] = tensor
        return self._stamped(name, like, part)

    def _check_free(self, name: str) -> None:
        assert name not in self.program.parameters, f"parameter {name!r} exists"
        assert name not in self.program.buffers, f"buffer {name!r} exists"

    def _stamped(self, name: str, like: fx.Node | None, part: str) -> fx.Node:
        """The node that reads a new tensor, with its metadata."""
        node = self.read(name)
        if like is not None:
            carry(like, node)
        if part:
            node.meta[KEY] = known_role(part)
        if self.by:
            node.meta["pass"] = self.by
        return node

    def fresh(self, name: str) -> str:
        """`name` if no tensor has it, otherwise `name_2`, `name_3`, ...: the first that is free."""
        return unused_name(self.program.tensors(), name)

    def assign(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """Replace the value of a parameter, keep its name and return the node that reads it.

        The storage of the old value is not touched. If the shape changes, create the calls that read it again: the shape
        of a call is inferred when it is created.
        """
        assert name in self.program.parameters, f"no parameter {name!r}"
        self.program.parameters[name] = tensor
        node = self.read(name)
        if self._mode is not None:
            node.meta["val"] = fake_parameter(tensor, self._mode)
        return node

    def read(self, name: str) -> fx.Node:
        """The node that reads a tensor of the program; a graph has one per tensor."""
        if name not in self._tensors:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                node = self.graph.get_attr(name)
            if self._mode is not None:
                node.meta["val"] = fake_parameter(self.program.tensor(name), self._mode)
            self._tensors[name] = node
        return self._tensors[name]

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` use `new`, except `new` itself and what it is computed from."""
        kept, stack = {new}, [new]
        while stack:
            sources = [item for item in stack.pop().all_input_nodes if old < item and item not in kept]
            kept.update(sources)
            stack += sources
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)

    def close(self) -> None:
        """Remove dead code and check that the graph is well formed."""
        remove_dead(self.program)
        self.graph.lint()


def unused_name(taken: Container[str], name: str) -> str:
    """`name` if it is not taken, otherwise `name_2`, `name_3`, ...: the first that is free."""
    count, candidate = 1, name
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def remove_dead(program: Program) -> None:
    """Remove nodes without users, then parameters and buffers that no graph reads or writes."""
    used: set[str] = set()
    for graph in program.graphs.values():
        for node in reversed(list(graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                graph.erase_node(node)
        used |= set(tensor_nodes(graph))
    used.update(name for signature in program.signatures.values() for name in signature.writes)
    program.parameters = {name: tensor for name, tensor in program.parameters.items() if name in used}
    program.buffers = {name: tensor for name, tensor in program.buffers.items() if name in used}
    program.ties = {alias: name for alias, name in program.ties.items() if name in used}
    program.frozen &= frozenset(program.parameters)
    program.lr_factors = {name: value for name, value in program.lr_factors.items() if name in used}
    left = (rule.among(used) for rule in program.step_rules)
    program.step_rules = tuple(rule for rule in left if rule is not None)


def _not_taken(call: fx.Node, error: Exception) -> str:
    """What arguments a call does not take, for the author of a pass or of a family of deltas."""
    shapes = [
        f"{node}{list(node.meta['val'].shape)}"
        for node in call.all_input_nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    site = call.meta.get("site")
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"it adds {call.target}{f' at {site}' if site else ''}, which does not take {', '.join(shapes)} ({said[:200]}): what it adds "
        "must have shapes that fit"
    )
