"""Bundles: a saved program loads unchanged, and any altered bundle is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import BundleError
from bmgraph.serialize.bundle import read_bundle, seal, strict_json, write_bundle
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from tests.helpers.bundles import edit_json, sign, toy


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "program"
    toy().save(str(folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "program"))


def test_a_program_computes_bit_equal_in_another_process(original: Path, tmp_path: Path) -> None:
    script = (
        "import sys, torch, bmgraph as bg\n"
        "program = bg.load(sys.argv[1])\n"
        "torch.save(program(ids=torch.arange(12).reshape(3, 4) % 11), sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(original), str(tmp_path / "out")], check=True, timeout=120
    )
    wanted = toy()(ids=torch.arange(12).reshape(3, 4) % 11)
    found = torch.load(tmp_path / "out", weights_only=True)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_loaded_program_is_the_saved_one(original: Path) -> None:
    assert str(bg.load(original)) == str(toy())


def test_saving_again_replaces_a_bundle(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"damaged")
    toy().save(str(folder))
    bg.load(folder)
    assert sorted(os.listdir(folder.parent)) == ["program"]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    for name, contents in (("note.txt", "mine"), ("manifest.json", '{"name": "a browser extension"}')):
        other = tmp_path / name.split(".")[0]
        other.mkdir()
        (other / name).write_text(contents)
        with pytest.raises(BundleError, match="folder with other contents"):
            toy().save(str(other))
        assert (other / name).read_text() == contents
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="it is a link"):
        write_bundle(tmp_path / "link", "program", {}, {})


def test_each_byte_counts(folder: Path) -> None:
    for name in ("weights.safetensors", "program.json", "example.safetensors"):
        data = bytearray((folder / name).read_bytes())
        for change in ("flip", "cut", "extend"):
            changed = bytearray(data)
            if change == "flip":
                changed[len(data) // 2] ^= 1
            (folder / name).write_bytes({"flip": changed, "cut": data[:-1], "extend": data + b"\0"}[change])
            with pytest.raises(BundleError, match=name):
                bg.load(folder)
        (folder / name).write_bytes(data)
    bg.load(folder)


def test_missing_and_left_over_files(folder: Path) -> None:
    (folder / "extra.py").write_text("print('hello')")
    with pytest.raises(BundleError, match=r"extra\.py"):
        bg.load(folder)
    (folder / "extra.py").unlink()
    (folder / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"lacks 'weights\.safetensors'"):
        bg.load(folder)
    with pytest.raises(BundleError, match="no such folder"):
        bg.load(folder / "nowhere")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/b", ".hidden", "..", "", "a\0b", "manifest.json"]
)
def test_names_that_leave_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    edit_json(
        folder / "manifest.json", lambda value: value["files"].update({name: {"size": 6, "sha256": "0"}})
    )
    message = "which is not a valid file name" if name.isprintable() else "holds control characters"
    with pytest.raises(BundleError, match=message):
        bg.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_pipes_and_folders(folder: Path, name: str, kind: str) -> None:
    moved = folder.parent / "moved"
    (folder / name).rename(moved)
    if kind == "link":
        (folder / name).symlink_to(moved)
    elif kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).mkdir()
    with pytest.raises(BundleError, match="is not a regular file"):
        bg.load(folder)


def _sealed(text: str) -> bytes:
    """The text of an object as a manifest with its checksum, as an attacker would write it."""
    data = ('{\n "checksum": "' + "0" * 64 + '",\n' + text[1:]).encode()
    return data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode(), 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 1, "format": 1}', "twice"),
        ('{"format": NaN}', "NaN"),
        ('{"format": -Infinity}', "Infinity"),
        ('{"format": 1e999}', "not a number of 64 bits"),
        ('{"format": 1' + "0" * 400 + "}", "not a number of 64 bits"),
        ('{"format": 2}', "reads format 1"),
        ('{"format": 1' + "0" * 10_000 + "}", "not valid JSON"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "deeply"),
        ('{"format": 1, "kind": "pickle"}', "kind"),
    ],
)
def test_manifests_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(_sealed(text))
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_the_seal_is_checked_before_anything_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bmgraph.serialize.bundle.parse_json", lambda _: pytest.fail("it was parsed"))
    for text in ("null", "[" * 100_000, '{"format": 1, "kind": "program", "files": {}}', "\udcff"):
        (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(BundleError, match="its contents do not match its checksum"):
            read_bundle(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "deeply"),
        ("[" * 100 + "]" * 100, "deeply"),
        ('{"a":' * 100 + "1" + "}" * 100, "deeply"),
        ("[" + "[]," * 2_100_000 + "0]", "too many values"),
        ('"\\', "not valid JSON"),
        ('["' + "[" * 1000 + '\\"[[[", ' + "1" * 4000 + "]", "not a number of 64 bits"),
        ("-1e400", "not a number of 64 bits"),
        ('"\\u001b[2J"', "control characters"),
        ('"\\\\\\u009b1m"', "control characters"),
        ('"\\b"', "control characters"),
        ('"\x7f"', "control characters"),
        ('"\u202e"', "control characters"),
        ('"\\u202E"', "control characters"),
        ('"\\ud800"', "not valid JSON"),
        ("-9223372036854775809", "not a number of 64 bits"),
    ],
)
def test_json_is_bounded_before_it_is_parsed(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(BundleError, match=message):
        strict_json(tmp_path / "a.json")


def test_json_within_its_bounds(tmp_path: Path) -> None:
    """Brackets in strings are no depth."""
    value = [
        "[" * 1000,
        '"[',
        "\\",
        {"a": [-(2**63), 2**63 - 1, 1e308]},
        "\\u001b",
        "one\ntwo\t",
        "\U0001f600\u00e4",
        '\\"[[',
    ]
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert strict_json(tmp_path / "a.json") == value


@pytest.mark.parametrize(
    "files", [[], None, {"a": {"size": True, "sha256": ""}}, {"a": {"size": 1}}, {"a": 3}]
)
def test_manifests_with_invalid_file_lists(tmp_path: Path, files: object) -> None:
    (tmp_path / "manifest.json").write_bytes(seal({"format": 1, "kind": "program", "files": files}))
    with pytest.raises(BundleError, match=r"names no files|size and checksum"):
        read_bundle(tmp_path)


def test_no_byte_of_the_manifest_is_free(folder: Path) -> None:
    data = (folder / "manifest.json").read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 4
        (folder / "manifest.json").write_bytes(changed)
        with pytest.raises(BundleError, match=r"manifest\.json"):
            read_bundle(folder)


def test_json_is_read_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bmgraph.serialize.bundle.LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('"0123456789"')
    with pytest.raises(BundleError, match="larger"):
        strict_json(tmp_path / "a.json")


def _tensors_file(path: Path, header: object, data: bytes = b"\0" * 8) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]},
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [1] * 100 + [2], "data_offsets": [0, 8]},
        {
            "dtype": "F32",
            "shape": [10**18 + 9] * 100_000,
            "data_offsets": [0, 8],
        },  # its product takes minutes
        [],
    ],
)
def test_false_tensor_headers(tmp_path: Path, entry: object) -> None:
    begin = time.process_time()
    with pytest.raises(BundleError):
        read_tensors(_tensors_file(tmp_path / "t", {"a": entry}))
    assert time.process_time() - begin < 3


def test_tensors_do_not_overlap(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert read_tensors(_tensors_file(tmp_path / "t", {"a": entry}))["a"].tolist() == [0, 0]
    with pytest.raises(BundleError, match="overlap"):
        read_tensors(_tensors_file(tmp_path / "t", {"a": entry, "b": entry}))
    (tmp_path / "t").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(BundleError, match="header"):
        read_tensors(tmp_path / "t")
    (tmp_path / "t").write_bytes(b"1234")
    with pytest.raises(BundleError, match="truncated"):
        read_tensors(tmp_path / "t")


def test_tensors_of_every_dtype_come_back(tmp_path: Path) -> None:
    from bmgraph.serialize.safetensors_io import DTYPES

    given = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()}
    given["view"] = torch.arange(6.0).reshape(2, 3).t()
    given["empty"] = torch.zeros(0, 4)
    write_tensors(tmp_path / "t", given)
    found = read_tensors(tmp_path / "t")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].tolist() == tensor.tolist()


def test_a_program_without_data_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="meta device"):
        toy().to("meta").save(str(tmp_path / "program"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_a_signed_program_that_is_none_is_refused(folder: Path, value: object) -> None:
    (folder / "program.json").write_text(json.dumps(value))
    sign(folder)
    with pytest.raises(BundleError, match=r"program.json.* does not hold a program"):
        bg.load(folder)


def test_checksums_redone_load_again(folder: Path) -> None:
    sign(folder)
    bg.load(folder)
