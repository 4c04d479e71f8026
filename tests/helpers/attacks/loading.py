"""Attacks on loading: re-signed mutations of saved folders, resource bombs, and kills of savers. Everything is seeded."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bmgraph.serialize.bundle import seal
from tests.helpers.attacks.watched import next_line
from tests.helpers.bundles import sign
from tests.helpers.paths import ROOT

Attack = Callable[[Path, random.Random], None]

_STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**62, 10**400, 1e308, "", "x", "../x", "a" * 1000, [], {}, [[[[]]]], {"node": "output"},
    {"dtype": "f32"}, [1] * 100, "\u202e", "\0", 3.5, False, "batch**99", "(" * 200, [2**62] * 8, {"float": "nan"},
)  # fmt: skip

_OPERATORS = (
    "aten.ctc_loss.IntList", "aten.segment_reduce", "aten.max_unpool2d", "aten.embedding_bag", "aten.save", "aten.arange",
    "aten.as_strided", "aten.div.Tensor_mode", "aten.repeat_interleave.Tensor", "aten.cat", "aten.unbind.int", "operator.pow",
    "operator.mul", "aten.upsample_nearest2d", "aten.one_hot", "aten.index.Tensor", "aten.gather", "aten.full", "aten.zeros",
)  # fmt: skip


def mutated(originals: list[Path], folder: Path, count: int, seed: int = 0) -> Iterator[tuple[str, Path]]:
    """`count` copies of saved programs and engines, each with one mutation and signed again: (name, folder)."""
    for index in range(count):
        pick = random.Random(f"{seed} {index}")
        source = pick.choice(originals)
        kinds = _PROGRAM if (source / "program.json").exists() else _ENGINE
        name, attack = pick.choice(kinds)
        target = Path(shutil.copytree(source, folder / str(index)))
        attack(target, pick)
        _sign_again(target)
        yield f"{name} {index}", target
        shutil.rmtree(target)


def _sign_again(folder: Path) -> None:
    """Sign a folder; one whose list of files was mutated keeps it, under a seal that fits."""
    try:
        sign(folder)
    except (AttributeError, KeyError, TypeError, OSError, ValueError):
        manifest = json.loads((folder / "manifest.json").read_text())
        if isinstance(manifest, dict):
            (folder / "manifest.json").write_bytes(seal(manifest))


def _change_json(name: str) -> Attack:
    """Replace, remove or repeat a value anywhere in a JSON file."""

    def attack(folder: Path, pick: random.Random) -> None:
        value = json.loads((folder / name).read_text())
        places: list[tuple[Any, Any]] = []

        def walk(item: Any) -> None:
            for key in item if isinstance(item, dict) else range(len(item)):
                if key not in ("sha256", "size", "checksum"):
                    places.append((item, key))
                    if isinstance(item[key], (dict, list)):
                        walk(item[key])

        walk(value)
        holder, key = pick.choice(places)
        if pick.random() < 0.2 and len(holder) > 1:
            del holder[key]
        else:
            holder[key] = pick.choice(_STRANGE)
        (folder / name).write_text(json.dumps(value))

    return attack


def _change_operator(folder: Path, pick: random.Random) -> None:
    tree = json.loads((folder / "program.json").read_text())
    node = pick.choice([item for item in tree["graphs"]["forward"] if item["op"] == "call_function"])
    node["target"] = pick.choice(_OPERATORS)
    if pick.random() < 0.7:
        inputs = [{"node": item["name"]} for item in tree["graphs"]["forward"] if item["op"] == "placeholder"]
        values = [*inputs, -1, 0, 2**40, -(2**63), [10**9] * 3, "trunc", None, [-1], 1e308, [inputs[0]]]
        node["args"] = [pick.choice(values) for _ in range(pick.randrange(4))]
    (folder / "program.json").write_text(json.dumps(tree))


def _change_header(folder: Path, pick: random.Random) -> None:
    """A false entry in the header of a tensors file."""
    file = pick.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entry = header[pick.choice([name for name in header if name != "__metadata__"])]
    key = pick.choice(("shape", "dtype", "data_offsets"))
    entry[key] = pick.choice(
        ([2**62, 4], [-1], [0], [1] * 65, "8", [0, 2**62], "F64", "BOOL", None, [8, 0], [0.5, 4])
    )
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _change_bytes(name: str) -> Attack:
    """Flip bits, cut or repeat bytes of a file."""

    def attack(folder: Path, pick: random.Random) -> None:
        data = bytearray((folder / name).read_bytes())
        place = pick.randrange(len(data))
        kind = pick.choice(("flip", "flip", "cut", "repeat"))
        if kind == "flip":
            for _ in range(pick.randrange(1, 9)):
                data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        elif kind == "cut":
            del data[place : place + pick.randrange(1, 50)]
        else:
            data[place:place] = data[place : place + 40]
        (folder / name).write_bytes(data)

    return attack


def _change_onnx(folder: Path, pick: random.Random) -> None:
    """An attribute, an input, a weight or an operator of the model replaced by a hostile one."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    file = folder / "model.onnx"
    model = onnx.ModelProto.FromString(file.read_bytes())
    graph = model.graph
    node = pick.choice(list(graph.node))
    kind = pick.choice(
        ("attribute", "input", "operator", "divisor", "empty", "grown", "order", "dims", "drop")
    )
    number = pick.choice((0, -1, 2**31, 2**40, 2**62, -(2**63), 3))
    if kind == "attribute":
        name = pick.choice(
            ("axis", "num_heads", "group", "block_size", "K", "N", "k", "to", "bits", "q_num_heads")
        )
        for index, item in enumerate(node.attribute):
            if item.name == name:
                del node.attribute[index]
                break
        node.attribute.append(helper.make_attribute(name, number))
    elif kind == "input" and node.input:
        node.input[pick.randrange(len(node.input))] = pick.choice(("", "nothing", *graph.node[-1].output))
    elif kind == "operator":
        node.op_type = pick.choice(
            ("Loop", "Attention", "Sum", "Mean", "DepthToSpace", "Div", "Tile", "Einsum", "OneHot")
        )
    elif kind == "divisor":
        graph.initializer.append(numpy_helper.from_array(np.full(8, -(2**63)), "least"))
        graph.initializer.append(numpy_helper.from_array(np.array(pick.choice((0, -1))), "divisor"))
        graph.node.insert(
            0, helper.make_node(pick.choice(("Div", "Mod")), ["least", "divisor"], ["quotient"])
        )
    elif kind == "empty":
        graph.initializer.append(
            helper.make_tensor(
                "none", onnx.TensorProto.FLOAT, [0, 2 ** pick.randrange(20, 40)], b"", raw=True
            )
        )
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "first"))
        graph.node.append(helper.make_node("ReduceSum", ["none", "first"], ["sums"]))
    elif kind == "grown":
        graph.initializer.append(numpy_helper.from_array(np.array([2 ** pick.randrange(18, 34)]), "much"))
        for index in range(pick.choice((1, 40))):
            graph.node.append(helper.make_node("ConstantOfShape", ["much"], [f"many{index}"]))
    elif kind == "order":
        first = graph.node.pop(0)
        graph.node.append(first)
    elif kind == "dims" and graph.initializer:
        pick.choice(list(graph.initializer)).dims.append(pick.choice((0, 2, 2**40, -1)))
    else:
        graph.node.remove(node)
    file.write_bytes(model.SerializeToString())


_PROGRAM: tuple[tuple[str, Attack], ...] = (
    ("value of program", _change_json("program.json")), ("value of manifest", _change_json("manifest.json")),
    ("operator", _change_operator), ("header", _change_header), ("bytes of program", _change_bytes("program.json")),
    ("bytes of weights", _change_bytes("weights.safetensors")),
)  # fmt: skip
_ENGINE: tuple[tuple[str, Attack], ...] = (
    ("onnx", _change_onnx), ("onnx", _change_onnx), ("bytes of model", _change_bytes("model.onnx")),
    ("value of manifest", _change_json("manifest.json")), ("header", _change_header),
)  # fmt: skip


def bombs(
    program: Path, engine: Path, folder: Path, count: int = 60, seed: int = 0
) -> Iterator[tuple[str, Path]]:
    """`count` copies that are small and would take much time or memory, signed again: (name, folder)."""
    for index in range(count):
        pick = random.Random(f"bomb {seed} {index}")
        name, source, attack = _BOMBS[index % len(_BOMBS)]
        target = Path(shutil.copytree(program if source == "program" else engine, folder / str(index)))
        attack(target, pick)
        sign(target)
        yield f"{name} {index}", target
        shutil.rmtree(target)


def _write_nodes(make: Callable[[int, str], dict[str, Any]], low: int, high: int) -> Attack:
    def attack(folder: Path, pick: random.Random) -> None:
        tree = json.loads((folder / "program.json").read_text())
        nodes = tree["graphs"]["forward"]
        first = next(item["name"] for item in nodes if item["op"] == "placeholder")
        extra = [make(index, first) for index in range(pick.randrange(low, high))]
        tree["graphs"]["forward"] = [*nodes[:-1], *extra, nodes[-1]]
        (folder / "program.json").write_text(json.dumps(tree))

    return attack


def _neg(index: int, first: str) -> dict[str, Any]:
    before = f"b{index - 1}" if index else first
    return {"name": f"b{index}", "op": "call_function", "target": "aten.neg", "args": [{"node": before}]}


def _square(index: int, first: str) -> dict[str, Any]:
    if not index:
        return {
            "name": "b0",
            "op": "call_function",
            "target": "aten.sym_size.int",
            "args": [{"node": first}, 0],
        }
    before = {"node": f"b{index - 1}"}
    return {"name": f"b{index}", "op": "call_function", "target": "operator.mul", "args": [before, before]}


def _text(name: str, text: Callable[[random.Random], bytes]) -> Attack:
    def attack(folder: Path, pick: random.Random) -> None:
        (folder / name).write_bytes(text(pick))

    return attack


def _wide_header(pick: random.Random) -> bytes:
    entry = {
        "dtype": "F32",
        "shape": [pick.randrange(2, 2**40)] * pick.randrange(50_000, 200_000),
        "data_offsets": [0, 0],
    }
    text = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(text)) + text


def _messages(pick: random.Random) -> bytes:
    graph = pick.choice((b"\x0a\x00", b"\x2a\x00", b"\x5a\x00")) * pick.randrange(700_000, 3_000_000)
    return b"\x3a" + _varint(len(graph)) + graph


def _varint(value: int) -> bytes:
    data = b""
    while value >= 128:
        data += bytes([value & 127 | 128])
        value >>= 7
    return data + bytes([value])


_BOMBS: tuple[tuple[str, str, Attack], ...] = (
    ("many nodes", "program", _write_nodes(_neg, 45_000, 250_000)),
    ("a chain of nodes", "program", _write_nodes(_neg, 500, 2_000)),
    ("squares of sizes", "program", _write_nodes(_square, 10, 60)),
    ("deep JSON", "program", _text("program.json", lambda pick: b"[" * pick.randrange(1000, 10**6))),
    ("wide JSON", "program", _text("program.json", lambda pick: b"[" + b"{}," * pick.randrange(700_000, 3_000_000) + b"0]")),
    ("long number", "program", _text("program.json", lambda pick: b"1" * pick.randrange(10**5, 10**7))),
    ("long string", "program", _text("program.json", lambda pick: b'"' + b"\\u0041" * pick.randrange(10**5, 4 * 10**6) + b'"')),
    ("wide header", "program", _text("weights.safetensors", _wide_header)),
    ("wide header of an example", "engine", _text("example.safetensors", _wide_header)),
    ("empty messages", "engine", _text("model.onnx", _messages)),
    ("changed model", "engine", _change_onnx),
    ("null", "program", _text("program.json", lambda pick: pick.choice((b"null", b"1e999", b"3", b"{}", b"\xff")))),
)  # fmt: skip

_SAVER = """
import sys, torch
from pathlib import Path
from bmgraph.serialize.bundle import write_bundle
from bmgraph.serialize.safetensors_io import write_tensors
number = 0
while True:
    number += 1
    tensors = {name: torch.full((20_000,), float(number)) for name in "ab"}
    write_bundle(Path(sys.argv[1]), "program", {"number": number}, {
        name: (lambda file, name=name: write_tensors(file, {name: tensors[name]})) for name in tensors
    })
    if number == 1:
        print("ready", flush=True)
"""


def kill_savers(path: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Kill `count` processes while they save bundles to `path`, one after the other; after each, what is wrong ("" if nothing)."""
    from bmgraph.errors import BundleError
    from bmgraph.serialize.bundle import read_bundle
    from bmgraph.serialize.safetensors_io import read_tensors

    pick = random.Random(f"kill {seed}")
    for _ in range(count):
        process = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        next_line(process, 120)
        time.sleep(pick.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()
        try:
            bundle = read_bundle(path)
            found = {float(read_tensors(bundle.open(name))[name].unique().item()) for name in "ab"}
            wrong = "" if found == {float(bundle.manifest["number"])} else f"mixed: {found}"
        except BundleError as error:
            wrong = str(error)
        left = [name for name in os.listdir(path.parent) if name != path.name]
        yield wrong or (f"left {left}" if len(left) > 2 else "")
