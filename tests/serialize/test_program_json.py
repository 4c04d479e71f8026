"""The JSON form of programs: operators and values outside the allowlists are refused, and sizes are bounded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BmgraphError, BundleError
from bmgraph.serialize.program_json import decode, encode
from tests.helpers.bundles import toy

PROGRAM = toy()
DATA = encode(PROGRAM)


def _decode(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Any:
    """Decode the toy after `change(data, nodes by name)` edited it."""
    data = copy.deepcopy(DATA)
    change(data, {node["name"]: node for node in data["graphs"]["forward"]})
    return decode(data, PROGRAM.tensors(), PROGRAM.example)


def _call(data: dict[str, Any], target: str, *args: Any, **kwargs: Any) -> None:
    """Insert a call before the output."""
    node = {"name": "evil", "op": "call_function", "target": target, "args": list(args), "kwargs": kwargs}
    data["graphs"]["forward"].insert(-1, node)


def test_the_text_comes_back() -> None:
    assert str(_decode(lambda data, nodes: None)) == str(PROGRAM)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "aten.save", "aten.warn", "aten.from_file", "aten.set_grad_enabled", "aten.add_.Tensor",
     "aten.item", "aten.__class__", "aten.add.__init__", "aten._print", "bmgraph.__loader__", "torch.load", "aten.format",
     "operator.methodcaller", "aten.add.str", "aten.mul.left_t", "aten.manual_seed", "prim.Print", "", "aten", "aten.x"],
)  # fmt: skip
def test_operators_off_the_list(target: str) -> None:
    with pytest.raises(BundleError, match="operator"):
        _decode(lambda data, nodes: _call(data, target, "/tmp/evil"))


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("operator.mul", ["a", 10**10], "not a number"),
        ("operator.mod", ["%9999999999d", 1], "not a number"),
        ("operator.mul", [{"node": "chunk"}, 10**10], "not a number"),
        ("operator.add", [[1], [2]], "not a number"),
        ("operator.getitem", ["text", 0], "not a number"),
        ("operator.mul", [2**61, 2**61], "64 bits"),
        ("operator.pow", [2, 10**9], "power"),
        ("operator.pow", [2**60, 8], "64 bits"),
        ("aten.full", [[2**30, 2**30], 1.0], "makes a tensor"),
        ("aten.arange", [2**50], "makes a tensor"),
    ],
)
def test_nothing_grows(target: str, args: list[Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        _decode(lambda data, nodes: _call(data, target, *args))


def test_numbers_do_not_grow_step_by_step() -> None:
    def change(data: dict[str, Any], nodes: dict[str, Any]) -> None:
        source: Any = 3
        for step in range(64):
            node = {
                "name": f"s{step}",
                "op": "call_function",
                "target": "operator.mul",
                "args": [source, source],
            }
            data["graphs"]["forward"].insert(-1, node)
            source = {"node": f"s{step}"}

    with pytest.raises(BundleError, match="64 bits"):
        _decode(change)


def _on_wide(target: str, *args: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(data: dict[str, Any], nodes: dict[str, Any]) -> None:
        wide = {"name": "wide", "op": "call_function", "target": "aten.full", "args": [[2**30], 1.0]}
        data["graphs"]["forward"].insert(-1, wide)
        _call(data, target, {"node": "wide"}, *args)

    return change


def test_a_tensor_is_not_split_into_millions() -> None:
    for target, args in (("aten.unbind.int", ()), ("aten.split.Tensor", (1,)), ("aten.chunk", (2**29,))):
        with pytest.raises(BundleError, match="pieces"):
            _decode(_on_wide(target, *args))


def test_an_operator_does_not_unroll_without_end() -> None:
    with pytest.raises(BundleError, match="unrolls"):
        _decode(_on_wide("aten.diff", 2**29))


def test_devices_are_not_named() -> None:
    with pytest.raises(BundleError, match="device"):
        _decode(lambda data, nodes: _call(data, "aten.zeros", [3], device="cuda"))


@pytest.mark.parametrize("name", ["ids=print('evil')", "class", "__class__", "a b", "", "ids)\nimport os"])
def test_names_that_would_stand_in_code(name: str) -> None:
    def as_input(data: dict[str, Any], nodes: dict[str, Any]) -> None:
        data["inputs"][0]["name"] = nodes["ids"]["target"] = name

    def as_argument(data: dict[str, Any], nodes: dict[str, Any]) -> None:
        nodes["linear"]["kwargs"] = {name: 1}

    def as_node(data: dict[str, Any], nodes: dict[str, Any]) -> None:
        _call(data, "aten.relu", {"node": "linear"})
        data["graphs"]["forward"][-2]["name"] = name

    for change in (as_input, as_argument, as_node):
        with pytest.raises(BundleError, match="name"):
            _decode(change)


@pytest.mark.parametrize("size", [-1, 2**50, True, 1.5, None, [1], "__import__('os')", "a;b", "x" * 300, ""])
def test_invalid_sizes(size: object) -> None:
    with pytest.raises(BundleError, match="not a valid size"):
        _decode(lambda data, nodes: data["inputs"][0]["shape"].__setitem__(0, size))


@pytest.mark.parametrize(
    "change",
    [
        lambda data, nodes: data["graphs"].update(other=[]),
        lambda data, nodes: data["graphs"]["forward"].pop(),
        lambda data, nodes: data["graphs"]["forward"].pop(0),
        lambda data, nodes: data["graphs"]["forward"].reverse(),
        lambda data, nodes: data["ties"].update(a="nothing"),
        lambda data, nodes: data["writes"].append("nothing"),
        lambda data, nodes: data["losses"].append("nothing"),
        lambda data, nodes: data["outputs"].append(data["outputs"][0]),
        lambda data, nodes: data["outputs"][0].update(dtype="i64"),
        lambda data, nodes: data["ranges"].update(batch=[5, 1]),
        lambda data, nodes: data["parameters"].pop(),
        lambda data, nodes: data.update(inputs=[]),
        lambda data, nodes: nodes["ids"].update(op="call_method"),
        lambda data, nodes: nodes["linear"].update(args=[{"node": "later"}]),
        lambda data, nodes: nodes["linear"].update(args=[{"dtype": "object"}]),
        lambda data, nodes: nodes["linear"].update(meta={"scope": 3}),
        lambda data, nodes: nodes["linear"].pop("args"),
    ],
)
def test_programs_that_do_not_hold_together(change: Callable[..., object]) -> None:
    with pytest.raises(BmgraphError):
        _decode(change)


def test_weights_in_float8_come_back(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randn(4, 8).to(torch.float8_e4m3fn))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            back = x.to(torch.float8_e5m2).to(torch.float32)
            return nn.functional.linear(back, self.codes.to(torch.float32))

    program = bg.capture(Small(), {"x": torch.randn(3, 8)})
    program.save(str(tmp_path / "small"))
    loaded = bg.load(tmp_path / "small")
    assert loaded.buffers["codes"].dtype == torch.float8_e4m3fn
    assert torch.equal(loaded(**program.example)["output"], program(**program.example)["output"])
