"""Programs and tensors of untrusted files: listed operators, bounded sizes, and one kind of error whatever is in them."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.ops.aten_in_files import ATEN
from bmgraph.runtime.generation.tokenizer import FastTokenizer
from bmgraph.serialize.bounded_shapes import check_sizes
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import sign, toy


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounds") / "program"
    toy().save(str(path))
    return path


def _with_program(saved: Path, folder: Path, text: str) -> Path:
    copy = Path(shutil.copytree(saved, folder / "program"))
    (copy / "program.json").write_text(text)
    sign(copy)
    return copy


@pytest.mark.parametrize(
    "text", ["null", "3", '"encoder"', "[]", '["encoder"]', "true", '{"encoder": 3}', "{}"]
)
def test_a_program_that_is_no_object(saved: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(BundleError, match="does not hold a"):
        bg.load(_with_program(saved, tmp_path, text))


@pytest.mark.parametrize(
    "name",
    ["aten.ctc_loss.IntList", "aten.max_pool2d_with_indices_backward", "aten.segment_reduce", "aten.embedding_bag",
     "aten.max_unpool2d", "aten._ctc_loss", "aten.adaptive_max_pool2d_backward", "aten.bincount", "aten.save", "aten.rand"],
)  # fmt: skip
def test_operators_that_nothing_emits_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    """The first ones end the process where their indices come from a file."""
    tree = json.loads((saved / "program.json").read_text())
    calls = [node for node in tree["graphs"]["forward"] if node["op"] == "call_function"]
    calls[0]["target"] = name
    with pytest.raises(BundleError, match=rf"operator '{name}' is not allowed in a program"):
        bg.load(_with_program(saved, tmp_path, json.dumps(tree)))


def test_the_list_holds_operators_of_this_torch() -> None:
    assert [name for name in sorted(ATEN) if not hasattr(torch.ops.aten, name)] == []


def test_integer_division_that_could_end_the_process(saved: Path, tmp_path: Path) -> None:
    tree = json.loads((saved / "program.json").read_text())
    nodes = tree["graphs"]["forward"]
    ids = next(node["name"] for node in nodes if node["op"] == "placeholder")
    place = next(index for index, node in enumerate(nodes) if node["op"] == "call_function")
    for number, (divisor, allowed) in enumerate(((-1, False), ({"node": ids}, False), (2, True))):
        node = {
            "name": "hostile", "op": "call_function", "target": "aten.div.Tensor_mode",
            "args": [{"node": ids}, divisor], "kwargs": {"rounding_mode": "trunc"},
        }  # fmt: skip
        changed = {**tree, "graphs": {"forward": [*nodes[:place], node, *nodes[place:]]}}
        folder = tmp_path / str(number)
        folder.mkdir()
        path = _with_program(saved, folder, json.dumps(changed))
        if allowed:
            bg.load(path)
        else:
            with pytest.raises(BundleError, match="hostile divides integers"):
                bg.load(path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([f"a{index}" for index in range(65)], "65 symbols"),
        (["batch**99"], "power above 8"),
        (["batch**99999999"], "power above 8"),
        (["batch**n"], "power above 8"),
        (["((batch**8)**8)**8"], "power above 8"),
        (["*".join(["batch"] * 40)], "more than 32 factors"),
    ],
)
def test_sizes_are_bounded_before_they_are_evaluated(sizes: list[str], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_sizes(sizes)
    check_sizes(["batch", "past + 2*sequence", "batch**2*sequence"])


def test_sizes_that_grow_from_node_to_node_are_refused(saved: Path, tmp_path: Path) -> None:
    """x, x^2, x^4, ...: twenty nodes make a number of a million digits."""
    tree = json.loads((saved / "program.json").read_text())
    nodes = tree["graphs"]["forward"]
    ids = next(node["name"] for node in nodes if node["op"] == "placeholder")
    place = next(index for index, node in enumerate(nodes) if node["op"] == "call_function")
    grown = [{"name": "g0", "op": "call_function", "target": "aten.sym_size.int", "args": [{"node": ids}, 0]}]
    for index in range(40):
        before = {"node": f"g{index}"}
        grown.append(
            {
                "name": f"g{index + 1}",
                "op": "call_function",
                "target": "operator.mul",
                "args": [before, before],
            }
        )
    tree["graphs"]["forward"] = [*nodes[:place], *grown, *nodes[place:]]
    began = time.process_time()
    with pytest.raises(BundleError, match=r"degree above 64|more than 64 bits"):
        bg.load(_with_program(saved, tmp_path, json.dumps(tree)))
    assert time.process_time() - began < 20


def test_a_program_of_too_many_nodes_is_refused_within_seconds(saved: Path, tmp_path: Path) -> None:
    tree = json.loads((saved / "program.json").read_text())
    nodes = tree["graphs"]["forward"]
    last = next(node["name"] for node in nodes if node["op"] == "placeholder")
    extra = [
        {"name": f"n{i}", "op": "call_function", "target": "aten.neg", "args": [{"node": last}]}
        for i in range(250_000)
    ]
    tree["graphs"]["forward"] = [*nodes[:-1], *extra, nodes[-1]]
    began = time.process_time()
    with pytest.raises(BundleError, match=r"list of 1 to 40000 nodes"):
        bg.load(_with_program(saved, tmp_path, json.dumps(tree)))
    assert time.process_time() - began < 30


def test_a_header_of_many_sizes_is_refused_at_once(tmp_path: Path) -> None:
    """Multiplying a million sizes took 42 s."""
    entry = {"dtype": "F32", "shape": [2**40] * 160_000, "data_offsets": [0, 8]}
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    began = time.process_time()
    with pytest.raises(BundleError, match="size that differs"):
        read_tensors(tmp_path / "a")
    assert time.process_time() - began < 5


def test_empty_tensors_with_large_sizes_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(BundleError, match="size that differs"):
        read_tensors(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.tensor([1.0, -2.0, 0.5]).to(dtype)
    write_tensors(tmp_path / "a", {"a": value})
    found = read_tensors(tmp_path / "a")["a"]
    assert found.dtype is dtype
    assert torch.equal(found.float(), value.float())


class _Panic(BaseException):
    """What pyo3 raises where Rust code panics: not an Exception."""


def test_a_panic_of_the_tokenizer_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")

    class Library:
        @staticmethod
        def from_str(text: str) -> Any:
            raise _Panic("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", Library)
    with pytest.raises(BundleError, match="the tokenizer cannot be read: index out of bounds"):
        FastTokenizer("{}")
