"""Five hundred hostile bundles, loaded in a monitored process: each is refused or harmless."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.runtime.temporary import PREFIX
from tests.helpers.bundles import sign, toy
from tests.helpers.paths import ROOT

SPARE_MEMORY = 200 * 2**20
SECONDS = 30

Mutation = Callable[[Path, random.Random], None]

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, "", "x", "../x", "/etc/passwd", "a" * 1000, [], {}, [[[[]]]],
    {"node": "output"}, {"node": "nothing"}, {"dtype": "object"}, {"float": "1e9"}, {"dtype": "f32"}, [1] * 100,
    "__import__('os').system('id')", "x=print(1)", "lambda: 0", "\u202e", "\0", 3.5, {"a": {"b": {"c": 1}}}, False,
)  # fmt: skip

OPERATORS = (
    "os.system", "builtins.eval", "builtins.exec", "operator.attrgetter", "operator.methodcaller", "posix.system",
    "aten.from_file", "aten.save", "aten.warn", "aten.set_grad_enabled", "aten.manual_seed", "aten.add_.Tensor",
    "aten.copy_", "aten.relu_", "aten.item", "aten.__class__", "aten.add.__init__", "aten._print", "aten.zero_",
    "aten.lstm.input", "aten.format", "aten.percentFormat", "aten.tensor", "aten.rand", "aten.mul.left_t", "prim.Print",
    "bmgraph.__loader__", "bmgraph.nothing", "torch.load", "torch.ops.load_library", "aten.set_.source_Storage_storage_offset",
    "aten.resize_", "aten.arange", "aten.unbind.int", "aten.nonzero", "aten.cat", "operator.mul", "aten.sum", "aten.gelu",
)  # fmt: skip


def _bytes(folder: Path, pick: random.Random) -> None:
    file = pick.choice([item for item in sorted(folder.iterdir()) if item.stat().st_size])
    data = bytearray(file.read_bytes())
    kind = pick.choice(("flip", "cut", "extend", "zero", "swap"))
    place = pick.randrange(len(data))
    if kind == "flip":
        data[place] ^= 1 << pick.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "extend":
        data += pick.randbytes(pick.randrange(1, 100))
    elif kind == "zero":
        data[place : place + 64] = bytes((value + 1) % 256 for value in data[place : place + 64])
    else:
        data[place:] = data[place:][::-1] + b"\n"
    file.write_bytes(data)


def _names(folder: Path, pick: random.Random) -> None:
    def change(manifest: dict[str, Any]) -> None:
        files = manifest["files"]
        old = pick.choice(sorted(files))
        bad = (
            "../x",
            "/etc/passwd",
            "a/../../b",
            "..",
            ".",
            "con\0x",
            "\u2025/x",
            "manifest.json",
            "x" * 500,
            "~",
            "./a",
        )
        files[pick.choice(bad)] = files[old]
        if pick.random() < 0.5:
            del files[old]

    _edit(folder / "manifest.json", change)


def _links(folder: Path, pick: random.Random) -> None:
    file = pick.choice(sorted(folder.iterdir()))
    kind = pick.choice(("link", "outside", "dangling", "pipe", "folder", "loop", "extra", "device"))
    if kind == "extra":
        (folder / "extra").symlink_to("/etc/passwd")
        return
    data = file.read_bytes()
    file.unlink()
    if kind == "link":
        (folder.parent / "same").write_bytes(data)
        file.symlink_to(folder.parent / "same")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        places = {
            "outside": "/etc/passwd",
            "dangling": "/nowhere/at/all",
            "loop": file.name,
            "device": "/dev/zero",
        }
        file.symlink_to(places[kind])


def _values(folder: Path, pick: random.Random) -> None:
    """Replace, delete or duplicate one value anywhere in a JSON file."""
    name = pick.choice([item for item in ("program.json", "manifest.json") if (folder / item).exists()])

    def change(value: Any) -> None:
        places: list[tuple[Any, Any]] = []

        def walk(item: Any) -> None:
            for key in item if isinstance(item, dict) else range(len(item)):
                places.append((item, key))
                if isinstance(item[key], (dict, list)):
                    walk(item[key])

        walk(value)
        holder, key = pick.choice([place for place in places if place[1] not in ("sha256", "size")])
        kind = pick.choice(("replace", "replace", "replace", "remove", "repeat"))
        if kind == "remove":
            del holder[key]
        elif kind == "repeat" and isinstance(holder, list):
            holder.insert(key, holder[key])
        else:
            holder[key] = pick.choice([item for item in STRANGE if item != holder[key]])

    _edit(folder / name, change)


def _nodes(folder: Path) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = json.loads((folder / "program.json").read_text())["graphs"]["forward"]
    return nodes


def _operators(folder: Path, pick: random.Random) -> None:
    if not (folder / "program.json").exists():
        return _onnx(folder, pick)

    def change(value: Any) -> None:
        calls = [node for node in value["graphs"]["forward"] if node["op"] == "call_function"]
        node = pick.choice(calls)
        node["target"] = pick.choice([name for name in OPERATORS if name != node["target"]])
        if pick.random() < 0.5:
            node["args"] = pick.choice(
                (
                    ["/tmp/evil"],
                    [10**9],
                    ["%9999999999d", 1],
                    ["a", 10**10],
                    [{"node": "ids"}, 10**18],
                    [[10**9, 10**9]],
                    [],
                )
            )
        if pick.random() < 0.2:
            node["kwargs"] = {pick.choice(("device", "x=1, y", "out", "dtype", "filename")): "cuda"}

    return _edit(folder / "program.json", change)


def _shapes(folder: Path, pick: random.Random) -> None:
    name = "program.json" if (folder / "program.json").exists() else "manifest.json"

    def change(value: Any) -> None:
        spec = pick.choice(value["inputs"] + value["outputs"])
        kind = pick.choice(("dim", "rank", "dtype", "name", "range"))
        if kind == "dim":
            strange = (
                -1,
                2**50,
                10**30,
                "batch**99999999",
                "__import__('os')",
                "(" * 300,
                1.5,
                None,
                True,
                [1],
                "b;a",
            )
            spec["shape"][pick.randrange(len(spec["shape"]))] = pick.choice(strange)
        elif kind == "rank":
            spec["shape"] = pick.choice(([], [1] * 100, spec["shape"] + [7], "batch", None))
        elif kind == "dtype":
            spec["dtype"] = pick.choice(("object", "c128", "bool", 7, None, "i8"))
        elif kind == "name":
            spec["name"] = pick.choice(
                ("ids=__import__('os').system('id')", "class", "self", "", "../x", "a b", 7)
            )
        else:
            value["ranges"][pick.choice(("batch", "other"))] = pick.choice(
                ([5, 1], [-1, 3], [None, 3], 3, [1, 2, 3], ["a", "b"])
            )

    _edit(folder / name, change)


def _tensors(folder: Path, pick: random.Random) -> None:
    """Put a false entry into the header of a tensors file."""
    file = pick.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = pick.choice([item for item in header if item != "__metadata__"])
    entry = header[name]
    kind = pick.choice(("shape", "dtype", "offsets", "rename", "drop", "length"))
    if kind == "shape":
        entry["shape"] = pick.choice(([2**62, 4], [-1], [0], [1] * 64, "8", [*entry["shape"], 2]))
    elif kind == "dtype":
        entry["dtype"] = pick.choice(("F64", "I8", "Q4", None, "BOOL", 3))
    elif kind == "offsets":
        entry["data_offsets"] = pick.choice(([0, 2**60], [-8, 8], [8, 0], [1, 2], None, [0.5, 4]))
    elif kind == "rename":
        header[pick.choice(("__class__", "forward", "a..b", "../x", "training", "x" * 5000))] = header.pop(
            name
        )
    elif kind == "drop":
        del header[name]
    text = json.dumps(header).encode()
    size = 2**63 if kind == "length" else len(text)
    file.write_bytes(struct.pack("<Q", size) + text + data[8 + length :])


def _onnx(folder: Path, pick: random.Random) -> None:
    import onnx
    from onnx import helper, numpy_helper

    if not (folder / "model.onnx").exists():
        return _tensors(folder, pick)
    import numpy as np

    model = onnx.load(folder / "model.onnx", load_external_data=False)
    graph = model.graph
    kind = pick.choice(("bomb", "operator", "outside", "dims", "rewire", "function", "attribute", "chain"))
    weight = pick.choice(list(graph.initializer))
    if kind == "bomb":
        graph.initializer.append(numpy_helper.from_array(np.array([2**14, 2**14], np.int64), "sizes"))
        graph.node.append(
            helper.make_node(pick.choice(("ConstantOfShape", "RandomNormal")), ["sizes"], ["bomb"])
        )
    elif kind == "chain":
        graph.initializer.append(numpy_helper.from_array(np.full(1, 2**9, np.int64), "sizes"))
        graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "bomb0"))
        for step in range(4):
            graph.node.append(helper.make_node("Tile", [f"bomb{step}", "sizes"], [f"bomb{step + 1}"]))
    elif kind == "operator":
        node = pick.choice(list(graph.node))
        node.op_type, node.domain = pick.choice(
            (
                ("EPContext", "com.microsoft"),
                ("Loop", ""),
                ("If", ""),
                ("PyOp", "ai.onnx.contrib"),
                ("Relu", "evil"),
                ("Sin", ""),
            )
        )
    elif kind == "outside":
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        del weight.external_data[:]
        weight.external_data.add(
            key="location", value=pick.choice(("/etc/passwd", "../x", "model.onnx", "/dev/zero"))
        )
    elif kind == "dims":
        weight.dims.append(pick.choice((2**40, -1, 3)))
    elif kind == "rewire":
        node = pick.choice(list(graph.node))
        node.input[0] = pick.choice((node.output[0], "nothing", graph.node[-1].output[0]))
    elif kind == "function":
        model.functions.append(
            helper.make_function("evil", "F", ["a"], ["b"], [], [helper.make_opsetid("", 20)])
        )
    else:
        node = pick.choice(list(graph.node))
        node.attribute.append(helper.make_attribute("axis", pick.choice((2**40, -(2**40)))))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return None


MUTATIONS: tuple[Mutation, ...] = (_bytes, _names, _links, _values, _operators, _shapes, _tensors, _onnx)


def _edit(file: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


WATCHER = """
import json, os, resource, sys, time

import torch, bmgraph as bg
from bmgraph.errors import BmgraphError

for path in sys.argv[2:4]:  # loads all modules that loading needs
    warm = bg.load(path)
    str(warm)
    warm(**warm.example)
root = os.path.realpath(sys.argv[4])
installed = tuple(os.path.realpath(item) for item in (*sys.path, sys.base_prefix) if item)
inside, seen, active = [""], [], [False]
own = sys.argv[5]  # the prefix of private folders, of engines that run from copies of what was checked; "" for others
FOLDERS = ("os.mkdir", "os.chmod", "os.remove", "os.rmdir", "tempfile.mkdtemp", "tempfile.mkstemp", "shutil.rmtree", "fcntl.flock",
           "fcntl.lockf")
PASSIVE = ("object.", "sys._getframe", "os.listdir", "os.scandir", "ctypes.", "gc.", "code.", "marshal.",
           "builtins.id", "sys.unraisablehook", "array.", "threading", "_thread", "time.")

def watch(event, arguments):
    if not active[0] or event.startswith(PASSIVE):
        return
    if own and event in (*FOLDERS, "open"):
        name = arguments[0]
        if isinstance(name, int) or os.fsdecode(name).startswith(own) or (event in FOLDERS and os.sep not in os.fsdecode(name)):
            return
    if event == "open":
        name = arguments[0]
        if isinstance(name, int):
            return
        name = os.fsdecode(name)
        place = os.path.realpath(name)
        writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and (place == inside[0] or place.startswith((inside[0] + os.sep, "/sys/devices/", "/proc/"))):
            return
        if not writes and os.sep not in name and not os.path.lexists(name) and name in os.listdir(inside[0]):
            return  # by the opened folder, of which the event says nothing; the working folder has no such file
        if not writes and place.startswith(installed):
            return  # torch looks up its own source for a message; versions are read from metadata
        seen.append(f"open {name}")
    elif event == "import":
        # torch imports parts of itself when it first explains an error: those are no choice of the file's
        if str(arguments[0]) not in sys.modules and not str(arguments[0]).startswith(("torch.", "sympy.", "onnx.")):
            seen.append(f"import {arguments[0]}")
    elif event in ("exec", "compile"):
        code = arguments[0]
        name = getattr(code, "co_filename", arguments[1] if event == "compile" else "?")
        if isinstance(name, bytes):
            name = name.decode()
        if str(name).startswith(("<eval_with_key>", "<lambdifygenerated", "<string>", "<frozen")):
            return
        if os.path.realpath(str(name)).startswith(installed):
            return
        seen.append(f"{event} {str(name)[:100]}")
    else:
        seen.append(event)

sys.addaudithook(watch)
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for line in sys.stdin:
    folder = line.strip()
    inside[0], seen[:] = os.path.realpath(folder), []
    began = time.monotonic()
    active[0] = True
    try:
        found = bg.load(folder)
        outcome, message = type(found).__name__, ""
        str(found)
    except BmgraphError as error:
        outcome, message = "refused", str(error)
    except BaseException as error:
        outcome, message = "crashed", f"{type(error).__name__}: {error}"
    active[0] = False
    size = sum(os.lstat(os.path.join(folder, name)).st_size for name in os.listdir(folder))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024 - 2 * size
    print(json.dumps([outcome, message[:500], list(seen), time.monotonic() - began, grown]), flush=True)
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("originals")
    toy().save(str(folder / "program"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    bg.compile(model, example=(torch.randn(3, 4),), backend="onnx").save(folder / "engine")
    return [folder / "program", folder / "engine"]


def _attack(originals: list[Path], folder: Path, count: int, signed: bool, own: str) -> list[str]:
    """Load `count` altered bundles in a monitored process; returns the outcomes."""
    command = [sys.executable, "-c", WATCHER, "", *map(str, originals), str(folder), own]
    outcomes = []
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for seed in range(count):
            pick = random.Random(f"{seed} {signed}")
            mutation = MUTATIONS[seed % len(MUTATIONS)]
            target = folder / f"{seed}" / "bundle"
            shutil.copytree(originals[seed // len(MUTATIONS) % 2], target)
            mutation(target, pick)
            if signed and mutation not in (_names, _links):
                _sign_again(target)
            process.stdin.write(f"{target}\n")
            process.stdin.flush()
            answer = _answer(process)
            assert answer is not None, f"mutation {seed} ({mutation.__name__}) ended or hung the process"
            outcome, message, seen, seconds, grown = json.loads(answer)
            told = f"mutation {seed} ({mutation.__name__}): {outcome} {message}"
            assert outcome in ("refused", "Program", "OrtEngine", "OpenVinoEngine"), told
            assert not seen, f"{told}: it did {seen}"
            assert seconds < SECONDS, f"{told}: it took {seconds:.0f} s"
            assert grown < SPARE_MEMORY, f"{told}: it took {grown // 2**20} MB"
            assert "\n" not in message, told
            outcomes.append(outcome if signed or outcome == "refused" else told)
            shutil.rmtree(target.parent)
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    return outcomes


def _answer(process: subprocess.Popen[str]) -> str | None:
    import select

    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 120)
    return (process.stdout.readline() or None) if ready else None


def _sign_again(folder: Path) -> None:
    try:
        sign(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return  # the manifest itself was altered too far to sign


def _check(originals: list[Path], folder: Path, count: int, own: str = "") -> None:
    plain = _attack(originals, folder / "plain", count, signed=False, own=own)
    believed = [outcome for outcome in plain if outcome != "refused"]
    assert not believed, believed[:5]
    signed = _attack(originals, folder / "signed", count, signed=True, own=own)
    assert signed.count("refused") > count // 2


@pytest.mark.parametrize("name", [None, "../x", "a" * 1000, {}])
def test_no_package_is_looked_for_by_what_is_no_name(
    name: Any, originals: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "bmgraph.backends.outside_packages", lambda name: pytest.fail("it looked for a package")
    )
    shutil.copytree(originals[1], tmp_path / "engine")
    _edit(tmp_path / "engine" / "manifest.json", lambda manifest: manifest.update(backend=name))
    _sign_again(tmp_path / "engine")
    with pytest.raises(BundleError, match="no name of a backend"):
        bg.load(tmp_path / "engine")


def test_altered_bundles(originals: list[Path], tmp_path: Path) -> None:
    _check(originals, tmp_path, 64)


@pytest.mark.slow
def test_five_hundred_altered_bundles(originals: list[Path], tmp_path: Path) -> None:
    _check(originals, tmp_path, 504)


@pytest.mark.slow
def test_five_hundred_altered_bundles_for_openvino(originals: list[Path], tmp_path: Path) -> None:
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    bg.compile(model, example=(torch.randn(3, 4),), backend="openvino").save(tmp_path / "engine")
    own = str(Path(tempfile.gettempdir()) / PREFIX)
    _check([originals[0], tmp_path / "engine"], tmp_path, 504, own)
