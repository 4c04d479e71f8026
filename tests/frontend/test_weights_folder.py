"""A model on the meta device with a folder of weights is a program: as the model with its weights, or one clear error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bmgraph as bg
from bmgraph.errors import BundleError, CaptureError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize
from bmgraph.serialize.weight_files import INDEX, WEIGHTS
from bmgraph.utils.stored_tensor import StoredTensor, is_too_large, row_blocks
from tests.helpers.paths import ROOT


class Model(nn.Module):
    """An embedding whose table is the output's too, a norm with statistics, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.norm = nn.BatchNorm1d(64)
        self.inner = nn.Linear(64, 300)
        self.inner.weight = self.table.weight
        self.outer = nn.Linear(300, 80)
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.full((80,), 2.0), persistent=False)

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            self.scale.fill_(2.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.outer(self.inner(self.norm(self.table(ids)))) * self.scale
        return result


IDS = torch.arange(7)


def _real() -> Model:
    torch.manual_seed(0)
    model = Model().eval()
    model.norm.running_mean.uniform_()  # type: ignore[union-attr]
    return model


def _meta() -> Model:
    with torch.device("meta"):
        return Model().eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tensors = {name: tensor for name, tensor in _real().state_dict().items() if name != "inner.weight"}
    save_file(tensors, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def expected() -> Program:
    return bg.capture(_real(), (IDS,))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "weights"))


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program fits in memory."""
    for module in (
        "frontend.weights_folder",
        "frontend.part_proof",
        "serialize.stored_file",
        "serialize.references",
    ):
        monkeypatch.setattr(f"bmgraph.{module}.memory_budget", lambda: 0)


def _same(program: Program, expected: Program) -> None:
    assert str(program) == str(expected)
    assert program.ties == expected.ties
    assert torch.equal(program(ids=IDS)["output"], expected(ids=IDS)["output"])


def test_a_small_model_is_proven_with_its_weights(
    original: Path, expected: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _meta()
    program = bg.capture(model, (IDS,), weights=original)
    _same(program, expected)
    assert program.unproven == ()
    assert program.fingerprint == expected.fingerprint
    assert isinstance(program.parameters["outer.weight"], StoredTensor)
    assert all(tensor.device.type == "meta" for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(Model, "forward", lambda self, ids: self.table(ids) * torch.rand(1))
    with pytest.raises(CaptureError, match="random"):
        bg.capture(_meta(), (IDS,), weights=original)


def test_what_does_not_fit_is_not_compared_and_says_so(
    original: Path, expected: Program, no_memory: None
) -> None:
    program = bg.capture(_meta(), (IDS,), weights=original)
    _same(program, expected)
    assert program.unproven == ("not compared with the model: its weights of 0.0 GB do not fit in memory",)
    assert all(map(is_too_large, program.parameters.values()))
    assert program.device.type == "cpu"
    report = bg.compile(program, backend="torch").report
    assert any(line.startswith("not compared with the model") for line in report.notes)


def test_one_pass_on_one_weight_saved_by_reference(folder: Path, tmp_path: Path, no_memory: None) -> None:
    program = bg.capture(_meta(), (IDS,), weights=folder)
    done = bg.Pipeline([Quantize("int8", activations="none", include=("outer",))]).run(program)
    for first, rows in row_blocks(program.parameters["outer.weight"]):
        own = slice(first, first + len(rows))
        error = (
            done.parameters["outer.weight_codes"][own] * done.parameters["outer.weight_scale"][own, None]
            - rows
        )
        assert float(error.abs().max()) <= float(rows.abs().max()) / 127
    done.save(str(tmp_path / "small"), weights="reference")
    manifest = json.loads((tmp_path / "small" / "manifest.json").read_text())
    assert sorted(manifest["references"]["tensors"]) == [
        "inner.bias", "norm.bias", "norm.weight", "outer.bias", "table.weight",
    ]  # fmt: skip
    loaded = bg.load(tmp_path / "small")
    _same(loaded, done)
    assert is_too_large(loaded.parameters["table.weight"])


def _gone(file: Path) -> None:
    file.unlink()


def _resaved(file: Path) -> None:
    save_file({"x": torch.ones(4)}, file)


def _linked(file: Path) -> None:
    file.rename(file.parent.parent / "elsewhere.safetensors")
    file.symlink_to(file.parent.parent / "elsewhere.safetensors")


@pytest.mark.parametrize("change", [_gone, _resaved, _linked])
def test_files_that_were_moved_or_changed_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    program = bg.capture(_meta(), (IDS,), weights=folder)
    program.save(str(tmp_path / "saved"), weights="reference")
    change(folder / WEIGHTS)
    with pytest.raises(
        BundleError, match=r"refers to weights in .*model\.safetensors, which (cannot|was changed)"
    ):
        bg.load(tmp_path / "saved")
    if change is not _linked:
        with pytest.raises(BundleError, match="was moved or replaced since"):
            program.save(str(tmp_path / "again"), weights="reference")


def _flip(file: Path, end: int) -> None:
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[end] ^= 1
    with open(file, "r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_reference_is_compared_with_its_digest_when_it_is_read(folder: Path, tmp_path: Path) -> None:
    bg.capture(_meta(), (IDS,), weights=folder).save(str(tmp_path / "saved"), weights="reference")
    _flip(folder / WEIGHTS, -1)
    loaded = bg.load(tmp_path / "saved")
    with pytest.raises(BundleError, match=r"tensor '.*': 'model.safetensors' in folder .* was altered"):
        loaded(ids=IDS)


def test_a_file_that_is_written_to_after_capture_is_found_out(folder: Path, no_memory: None) -> None:
    program = bg.capture(_meta(), (IDS,), weights=folder)
    _flip(folder / WEIGHTS, -1)
    os.utime(folder / WEIGHTS, ns=(0, 0))
    with pytest.raises(BundleError, match="was altered"):
        program(ids=IDS)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("weights.safetensors", "whole path"),
        ("/etc/passwd", "whole path"),
        ("/tmp/../x.safetensors", "whole path"),
    ],
)
def test_a_bundle_refers_to_files_of_tensors_alone(
    original: Path, tmp_path: Path, path: str, message: str
) -> None:
    from tests.helpers.bundles import edit_json

    bg.capture(_meta(), (IDS,), weights=original).save(str(tmp_path / "saved"), weights="reference")
    manifest = tmp_path / "saved" / "manifest.json"
    edit_json(manifest, lambda value: value["references"]["files"][0].update(path=path))
    with pytest.raises(BundleError, match=message):
        bg.load(tmp_path / "saved")
    edit_json(manifest, lambda value: value["references"].update(tensors={"table.weight": [7, "x", "0"]}))
    with pytest.raises(BundleError, match="does not say validly"):
        bg.load(tmp_path / "saved")


def _edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return run


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_edit(lambda t: t.pop("outer.bias")), r"holds no weights for outer\.bias"),
    "extra": (_edit(lambda t: t.update(more=torch.ones(2))), "holds weights for more, which the model does not have"),
    "shape": (
        _edit(lambda t: t.update({"outer.bias": torch.ones(81)})),
        r"holds outer\.bias as f32\[81\], where the model has f32\[80\]",
    ),
    "type": (
        _edit(lambda t: t.update({"outer.bias": t["outer.bias"].half()})),
        r"holds outer\.bias as f16\[80\], where the model has f32\[80\]",
    ),
    "several": (_edit(lambda t: (t.pop("outer.bias"), t.update(more=torch.ones(2)))), "and 1 more such difference"),
    "untied": (
        _edit(lambda t: t.update({"inner.weight": torch.ones(300, 64)})),
        r"different values for table\.weight and inner\.weight, which the model ties",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_other_weights_than_the_models_are_refused(folder: Path, name: str) -> None:
    change, message = ODD[name]
    change(folder)
    with pytest.raises(CaptureError, match=message):
        bg.capture(_meta(), (IDS,), weights=folder)


def test_what_cannot_be_captured_with_weights(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CaptureError, match=r"its parameter 'table\.weight' has values"):
        bg.capture(_real(), (IDS,), weights=original)
    with pytest.raises(CaptureError, match="there is no such folder"):
        bg.capture(_meta(), (IDS,), weights=tmp_path / "none")
    with pytest.raises(InputError, match="there are no weights to read"):
        bg.capture(_meta(), (IDS,), weights=tmp_path)
    with pytest.raises(CaptureError, match="example is on the meta device"):
        bg.capture(_meta(), (IDS.to("meta"),), weights=original)
    monkeypatch.setattr(Model, "_init_weights", lambda self, module: None)
    with pytest.raises(CaptureError, match=r"buffer 'scale' is on the meta device.*give it values"):
        bg.capture(_meta(), (IDS,), weights=original)
    model = _meta()
    model.scale = torch.full((80,), 2.0)
    bg.capture(model, (IDS,), weights=original)


def test_equal_copies_of_a_tied_weight_are_one(folder: Path, expected: Program) -> None:
    _edit(lambda t: t.update({"inner.weight": t["table.weight"].clone()}))(folder)
    _same(bg.capture(_meta(), (IDS,), weights=folder), expected)


@pytest.mark.parametrize(("name", "fits"), [("head", True), ("base", False)])
def test_a_folder_of_transformers(
    tmp_path: Path, name: str, fits: bool, request: pytest.FixtureRequest
) -> None:
    """Several files with an index, tied; and the base model, whose names lack a prefix."""
    transformers: Any = pytest.importorskip("transformers")
    if not fits:
        request.getfixturevalue("no_memory")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    real = transformers.LlamaForCausalLM(config).eval()
    saved = real if name == "head" else real.model
    saved.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / INDEX).is_file()
    example = {
        "input_ids": torch.arange(10).reshape(2, 5),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    program = bg.capture(model, example, weights=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(program(**example)["logits"], real(**example).logits)
    assert program.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert len(program.structure().attentions) == 1
    assert bool(program.unproven) is not fits


MEMORY = """
import json, struct, sys
from importlib import import_module
from pathlib import Path
import torch
from torch import nn
import bmgraph as bg
from benchmarks.tensors_on_disk import AnonymousMemory
from bmgraph.passes import Quantize
torch.set_num_threads(1)
folder = Path(sys.argv[1])
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(256, 4096), *(nn.Linear(4096, 4096, bias=False) for _ in range(6))).eval()
header, end = {}, 0
for name, tensor in model.state_dict().items():
    header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
    end += tensor.nbytes
text = json.dumps(header).encode()
with open(folder / "model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + torch.randn(4096, 256).numpy().tobytes())
    file.truncate(8 + len(text) + end)
bg.capture(nn.Linear(4, 4), (torch.zeros(2, 4),))
for module in ("frontend.weights_folder", "frontend.part_proof", "serialize.stored_file", "serialize.references"):
    import_module("bmgraph." + module).memory_budget = lambda: end // 2
memory = AnonymousMemory()
program = bg.capture(model, (torch.randn(3, 256),), weights=folder)
small = bg.Pipeline([Quantize("int8", activations="none", include=("0",))]).run(program)
small.save(str(folder / "saved"), weights="reference")
loaded = bg.load(folder / "saved")
weight = program.parameters["0.weight"]
codes, scale = loaded.parameters["0.weight_codes"], loaded.parameters["0.weight_scale"]
assert float((codes * scale[:, None] - weight).abs().max()) < 0.03, "values"
assert not loaded.fits_in_memory
print(end / 1e6, memory.end() * 1000)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell RssAnon")
def test_capture_a_pass_and_saving_by_reference_read_no_more_than_they_need(tmp_path: Path) -> None:
    """In anonymous memory, beside imports: less than two of the six large weights, of which none is touched."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    weights, peak = map(float, done.stdout.split())
    assert weights > 400
    assert peak < 134, done.stdout
