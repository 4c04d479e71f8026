"""Prints a program as stable text, which tests compare with golden copies."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bmgraph.ir.node_role import KEY
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dim_text, dims
from bmgraph.ir.tensor_spec import type_text


def program_text(program: Program) -> str:
    """One block per graph: its inputs, one line per node with its type, and its outputs."""
    return "\n".join(map(_entry_text, program.entries()))


def _entry_text(program: Program) -> str:
    graph = program.graph
    lines = [f"{program.entry}({', '.join(map(str, program.inputs))}):"]
    names: dict[fx.Node, str] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"%{node.target}"
        elif node.op == "get_attr":
            names[node] = str(node.target)
        elif node.op == "call_function":
            names[node] = numbered(node, counts)
            arguments = [argument_text(argument, names) for argument in node.args]
            arguments += [f"{key}={argument_text(item, names)}" for key, item in node.kwargs.items()]
            lines.append(
                f"  {names[node]} = {target_text(node.target)}({', '.join(arguments)})"
                f"{value_text(program, node)}{_metadata_text(node)}"
            )
        else:
            outputs = node.args[0]
            assert isinstance(outputs, (tuple, list))
            labels = [spec.name for spec in program.outputs] + [f"{buffer} <-" for buffer in program.writes]
            returned = [f"{label}={argument_text(item, names)}" for label, item in zip(labels, outputs)]
            lines.append(f"  return {', '.join(returned)}")
    return "\n".join(lines) + "\n"


def target_text(target: object) -> str:
    """The name of a call's target without the default overload: `aten.linear`, `aten.add.Tensor`, `operator.mul`."""
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.replace("::", ".")
        return name if target._overloadname == "default" else f"{name}.{target._overloadname}"
    name = str(getattr(target, "__name__", target))
    return f"operator.{name}" if getattr(operator, name, None) is target else name


def numbered(node: fx.Node, counts: dict[str, int]) -> str:
    """`%linear`, `%linear_1`, ...: a call is named by its operator and a counter, independent of the node's name."""
    stem = _stem(node.target)
    counts[stem] = counts.get(stem, -1) + 1
    return f"%{stem}" + (f"_{counts[stem]}" if counts[stem] else "")


def _stem(target: Any) -> str:
    """The operator of a call without namespace and overload."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.split("::")[1])
    return str(getattr(target, "__name__", "value"))


def argument_text(argument: object, names: dict[fx.Node, str]) -> str:
    """An argument of a call; a node is printed as its name in `names`."""
    if isinstance(argument, fx.Node):
        return names[argument]
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(argument_text(item, names) for item in argument)}]"
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    return repr(argument)


def value_text(program: Program, node: fx.Node) -> str:
    """The type of a node's value, such as ` : f32[batch, 384]`; empty if it is unknown."""
    found = node.meta.get("val")
    if isinstance(found, torch.Tensor):
        return f" : {type_text(found.dtype, dims(program, found))}"
    if isinstance(found, (torch.SymInt, int)) and not isinstance(found, bool):
        return f" : {dim_text(program, found)}"
    return ""


def _metadata_text(node: fx.Node) -> str:
    entries = [f"{key}={node.meta[key]}" for key in ("site", KEY, "pass") if node.meta.get(key)]
    return f"  # {' '.join(entries)}" if entries else ""
