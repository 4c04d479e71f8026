"""Roles of nodes: those of the library, names that others register, and what files say."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.api import NodeRole, register_role
from bmgraph.errors import InputError, PassError
from bmgraph.ir.node_role import KEY, has_role, is_delta
from bmgraph.ir.program import Program, output_node
from bmgraph.serialize.program_json import decode, encode
from tests.helpers.paths import ROOT


def marked(role: str) -> tuple[Program, Any]:
    """A linear whose output a node of the role doubles, and that node."""
    program = bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),))
    with program.edit() as editor:
        output = output_node(program.graph)
        returned: Any = output.args[0]
        double = editor.call(
            torch.ops.aten.mul.Tensor, returned[0], 2, like=returned[0], after=returned[0], part=role
        )
        output.args = ((double,),)
    return program, double


def again(program: Program) -> list[str]:
    """The roles of a program that was saved and loaded."""
    loaded = decode(encode(program), program.tensors(), program.example)
    return [node.meta[KEY] for node in loaded.graph.nodes if KEY in node.meta]


def test_a_text_is_the_role_that_it_names() -> None:
    program, node = marked("weight")
    assert node.meta[KEY] is NodeRole.WEIGHT
    assert has_role(node, NodeRole.WEIGHT)
    assert not is_delta(node)
    assert "# part=weight" in str(program)
    assert [type(role) for role in again(program)] == [NodeRole]


def test_a_role_that_nobody_knows_is_refused() -> None:
    with pytest.raises(
        PassError, match=r"'wieght' is no role of a node: use one of activation, .*register_role"
    ):
        marked("wieght")


def test_others_register_names() -> None:
    name = register_role("gate_of_tests", "what the test says")
    assert register_role(name, "what the test says") == name
    program, node = marked(name)
    assert has_role(node, name)
    assert again(program) == [name]
    for taken, meaning in (("weight", "w"), (name, "something else")):
        with pytest.raises(InputError, match=f"the role '{taken}' is taken"):
            register_role(taken, meaning)
    with pytest.raises(InputError, match="'No name' is not a lower-case identifier"):
        register_role("No name", "")


def test_a_role_may_be_refined() -> None:
    program, _ = marked("delta.scaled")
    assert again(program) == ["delta.scaled"]


def test_a_file_keeps_a_role_that_is_not_known_here() -> None:
    program, node = marked("mask")
    node.meta[KEY] = "of_a_package_that_is_not_installed"
    assert again(program) == ["of_a_package_that_is_not_installed"]


def test_the_library_writes_no_role_as_text() -> None:
    paths = [
        path for room in ("bmgraph", "passes", "runtime", "backends") for path in (ROOT / room).rglob("*.py")
    ]
    assert paths
    texts = [
        f"{path}:{node.value.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "part" and isinstance(node.value, ast.Constant)
    ]
    assert texts == []
