"""Large weights of a loaded program stay in their file, and are what was checked whenever they are read."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError, InputError, MisplacedError
from bmgraph.ir.program import Program
from bmgraph.passes import LoadDelta, LoRA, Quantize
from bmgraph.serialize.opened import open_regular_file
from bmgraph.serialize.safetensors_io import write_tensors
from bmgraph.serialize.stored_file import scanned_tensors, stored_tensors
from bmgraph.utils.digest import content_digest, fingerprint, same_fingerprint, weights_digest
from bmgraph.utils.stored_tensor import StoredTensor, byte_blocks, in_memory, is_too_large, row_blocks
from tests.helpers.bundles import edit_json

X = torch.linspace(-1, 1, 4 * 160).reshape(4, 160)


def _program() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(160, 160), nn.GELU(), nn.Linear(160, 160)).eval()
    return bg.capture(model, (X,))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "program"
    _program().save(str(folder))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "program"))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are longer than the block that is kept of each."""
    monkeypatch.setattr("bmgraph.serialize.opened._BLOCK", 4096)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program fits in memory."""
    for module in ("stored_file", "references"):
        monkeypatch.setattr(f"bmgraph.serialize.{module}.memory_budget", lambda: 0)


def _output(program: Program) -> torch.Tensor:
    return program(input=X)["output"]


def _overwrite(folder: Path, keep_time: bool = True) -> None:
    """Change one byte of the weights in place."""
    file = folder / "weights.safetensors"
    status = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-30_000, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-30_000, os.SEEK_END)
        stream.write(bytes([byte[0] ^ 1]))
    if keep_time:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_large_weights_stay_in_the_file_until_the_program_runs(folder: Path) -> None:
    program = bg.load(folder)
    weights = {
        name: tensor for name, tensor in program.parameters.items() if isinstance(tensor, StoredTensor)
    }
    assert sorted(weights) == ["0.weight", "2.weight"]
    assert all(tensor.kept is None for tensor in weights.values())
    assert torch.equal(_output(program), _output(_program()))
    assert all(tensor.kept is not None for tensor in weights.values())


def test_what_does_not_fit_is_read_for_each_call(folder: Path, no_memory: None) -> None:
    program = bg.load(folder)
    for _ in range(2):
        assert torch.equal(_output(program), _output(_program()))
    assert all(tensor.kept is None for tensor in program.parameters.values() if is_too_large(tensor))
    assert is_too_large(program.parameters["0.weight"])


def test_a_stored_tensor_is_a_tensor(folder: Path) -> None:
    stored, plain = bg.load(folder).parameters["0.weight"], _program().parameters["0.weight"]
    assert stored.kept is None
    assert (stored.shape, stored.dtype, stored.device, stored.stride()) == (
        plain.shape, plain.dtype, plain.device, plain.stride(),
    )  # fmt: skip
    assert (len(stored), stored.dim(), stored.numel(), stored.nbytes) == (160, 2, 160 * 160, 160 * 160 * 4)
    assert stored.kept is None
    for value in (
        stored + 0,
        stored[:],
        copy.deepcopy(stored),
        pickle.loads(pickle.dumps(stored)),
        stored.float(),
    ):
        assert type(value) is torch.Tensor
        assert torch.equal(value, plain)
    assert torch.equal(torch.nn.functional.linear(X, stored), torch.nn.functional.linear(X, plain))
    assert (stored.numpy() == plain.numpy()).all()


def test_what_is_written_into_a_stored_tensor_stays(folder: Path, tmp_path: Path, no_memory: None) -> None:
    program = bg.load(folder)
    stored = program.parameters["0.weight"]
    assert stored._version == 0
    stored.mul_(2)
    assert stored._version > 0
    program.save(tmp_path / "again")
    assert torch.equal(
        bg.load(tmp_path / "again").parameters["0.weight"] / 2, _program().parameters["0.weight"]
    )


@pytest.mark.parametrize("fits", [True, False])
def test_weights_that_are_overwritten_later_are_found_out(
    folder: Path, tmp_path: Path, fits: bool, request: pytest.FixtureRequest
) -> None:
    if not fits:
        request.getfixturevalue("no_memory")
    program = bg.load(folder)
    _overwrite(folder)
    with pytest.raises(BundleError, match=r"'weights.safetensors' in bundle .* was altered"):
        _output(program)
    with pytest.raises(BundleError, match="was altered"):
        program.save(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(BundleError, match="checksum"):
        bg.load(folder)


def test_weights_that_are_cut_later_are_found_out(folder: Path) -> None:
    program = bg.load(folder)
    os.truncate(folder / "weights.safetensors", 1000)
    with pytest.raises(BundleError, match="was altered"):
        _output(program)


def test_a_folder_that_is_removed_or_saved_anew_changes_nothing(folder: Path) -> None:
    programs = [bg.load(folder), bg.load(folder)]
    nn.init.zeros_((changed := bg.load(folder)).parameters["0.weight"])
    changed.save(folder)
    assert torch.equal(_output(programs[0]), _output(_program()))
    shutil.rmtree(folder)
    assert torch.equal(_output(programs[1]), _output(_program()))


def test_a_loaded_program_saves_itself_over_its_own_file(folder: Path) -> None:
    program = bg.load(folder)
    program.save(folder)
    program.save(folder)
    assert torch.equal(_output(bg.load(folder)), _output(_program()))


def test_values_that_are_not_finite_are_refused_when_a_file_is_loaded(folder: Path, tmp_path: Path) -> None:
    program = _program()
    program.parameters["0.weight"] = program.parameters["0.weight"].clone()
    program.parameters["0.weight"][3, 4] = float("nan")
    program.save(tmp_path / "nan")
    with pytest.raises(BundleError, match=r"0\.weight.*NaN"):
        bg.load(tmp_path / "nan")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn]
)
def test_blocks_are_those_of_the_tensor_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    plain = torch.arange(7 * 60).reshape(7, 60).to(dtype)
    write_tensors(tmp_path / "a.safetensors", {"a": plain, "view": plain.t(), "empty": plain[:0]})
    stored = stored_tensors(open_regular_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", False)
    for name, tensor in (("a", plain), ("view", plain.t()), ("empty", plain[:0])):
        assert in_memory(stored[name]).tolist() == tensor.tolist()
        assert content_digest(stored[name]) == content_digest(tensor)
        assert b"".join(byte_blocks(stored[name])) == b"".join(byte_blocks(tensor))
    for tensor in (stored["a"], plain):
        rows = [(first, block.clone()) for first, block in row_blocks(tensor, 100 * plain.element_size())]
        assert [first for first, _ in rows] == list(range(7))
        assert torch.cat([block.float() for _, block in rows]).equal(plain.float())
    assert weights_digest(dict(stored)) == weights_digest({"a": plain, "view": plain.t(), "empty": plain[:0]})


def test_fingerprints_of_files_and_of_early_versions_compare() -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(100, 300), "b": torch.randn(5)}
    both = fingerprint(tensors)
    new, old = both.split(",")
    assert new.startswith("2:")
    assert len(old) == 64
    assert same_fingerprint(both, new) is True
    assert same_fingerprint(old, both) is True
    assert same_fingerprint(old, new) is None
    assert same_fingerprint("", both) is None
    for index in ((0, 0), (99, 299)):
        changed = {**tensors, "a": tensors["a"].clone()}
        changed["a"][index] += 1
        assert same_fingerprint(fingerprint(changed), both) is False
    assert same_fingerprint(fingerprint({**tensors, "b": tensors["b"] + 1}), old) is False


def test_a_fingerprint_reads_blocks_of_a_file(
    folder: Path, no_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = bg.load(folder)
    monkeypatch.setattr("bmgraph.serialize.stored_file.FileTensor.blocks", None)
    found = fingerprint(program.parameters)
    assert same_fingerprint(found, _program().fingerprint) is True
    assert "," not in found


def test_an_adapter_of_an_early_version_knows_its_backbone(folder: Path, tmp_path: Path) -> None:
    bg.Pipeline([LoRA(r=2, targets=("0",))]).run(_program()).save_delta(tmp_path / "adapter")
    edit_json(
        tmp_path / "adapter" / "manifest.json",
        lambda manifest: manifest.update(backbone=manifest["backbone"].split(",")[1]),
    )
    adapter = {"adapter": tmp_path / "adapter"}
    bg.Pipeline([LoadDelta("adapter")]).run(bg.load(folder), resources=adapter)
    other = _program()
    other.parameters["0.weight"] = torch.zeros(160, 160)
    other.fingerprint = fingerprint(other.parameters)
    with pytest.raises(MisplacedError, match="another backbone"):
        bg.Pipeline([LoadDelta("adapter")]).run(other, resources=adapter)


def test_a_bundle_of_an_early_version_replays(folder: Path) -> None:
    from bmgraph.utils.digest import digest

    program = _program()
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    small.save(folder)
    bg.replay(folder, program)
    edit_json(folder / "manifest.json", lambda manifest: manifest.update(weights=digest(small)))
    bg.replay(folder, program)


def test_a_pass_on_a_program_that_does_not_fit_is_checked_at_its_sites(folder: Path, no_memory: None) -> None:
    done = bg.Pipeline([Quantize("int8", activations="none", include=("0.weight",))]).run(bg.load(folder))
    assert done.history[-1].compared == "1 replaced weights alone: the program's weights do not fit in memory"
    whole = bg.Pipeline([Quantize("int8", activations="none", include=("0.weight",))]).run(_program())
    for name in ("0.weight_codes", "0.weight_scale"):
        assert torch.equal(done.parameters[name], whole.parameters[name])
    assert is_too_large(done.parameters["2.weight"])


def test_a_file_is_what_was_checked_when_it_is_scanned(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"a": torch.arange(9.0), "b": torch.arange(40_000)})
    opened = open_regular_file(tmp_path / "a.safetensors")
    assert opened.check(opened.sha256())
    (tmp_path / "a.safetensors").write_bytes(b"0" * 400_000)
    with pytest.raises(BundleError, match="altered after it was checked"):
        scanned_tensors(opened)


def test_weights_are_copied_or_referred_to(folder: Path) -> None:
    with pytest.raises(InputError, match="'copy' or 'reference'"):
        _program().save(str(folder), weights="links")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no tensor of this program is in a file"):
        _program().save(str(folder), weights="reference")
    assert json.loads((folder / "manifest.json").read_text())["weights"].startswith("2:")
