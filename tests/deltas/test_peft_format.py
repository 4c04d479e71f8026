"""PEFT adapter folders: each side reads the other's to the same outputs; bad folders are refused with one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas import peft_format
from bmgraph.deltas.low_rank import LowRank
from bmgraph.deltas.peft_format import CONFIG, TENSORS, read_adapter
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import BmgraphError, BundleError, InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.passes import Deltas, LoadDelta, LoRA, Merge, Quantize
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.utils.digest import fingerprint
from bmgraph.verify.metrics import relative_error
from tests.helpers.captured import captured
from tests.helpers.deltas import Tied, replay_in_a_fresh_process, trained
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.zoo import BY_NAME
from tests.passes.test_lora import EXACT, fused


def loaded(program: Program, folder: Path) -> Program:
    """The program with the delta loaded from a folder."""
    return bg.Pipeline([LoadDelta("trec")]).run(program, resources={"trec": str(folder)})


def with_delta(program: Program, *passes: LoRA) -> Program:
    return trained(bg.Pipeline(list(passes or [LoRA(r=3)])).run(program), size=0.1)


def test_what_is_saved_is_read_back_to_the_same_bits(program: Program, tmp_path: Path) -> None:
    tuned = with_delta(program, LoRA(r=3, alpha=7, dropout=0.1))
    tuned.save_delta(str(tmp_path / "trec"))
    again = loaded(program, tmp_path / "trec")
    assert torch.equal(again(**tokens())["logits"], tuned(**tokens())["logits"])
    assert again.frozen == tuned.frozen
    assert [delta.options["dropout"] for delta in deltas_of(again.graph)] == [0.1] * 4
    assert again.structure().roles == program.structure().roles
    stamped = str(again).replace("loaddelta{delta=trec}", "lora{r=3,alpha=7,dropout=0.1}")
    assert stamped == str(tuned).replace("alpha=7.0", "alpha=7")


@pytest.mark.parametrize("saved_by", ["bmgraph", "peft"])
def test_an_adapter_of_links_into_a_cache_is_read(saved_by: str, program: Program, tmp_path: Path) -> None:
    """As Hugging Face's cache holds them; links that lead elsewhere are refused."""
    with_delta(program, LoRA(r=2)).save_delta(str(tmp_path / "plain"))
    if saved_by == "peft":
        (tmp_path / "plain" / "manifest.json").unlink()
    (tmp_path / "plain" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    folder, blobs = tmp_path / "cache" / "snapshots" / "12ab", tmp_path / "cache" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    for count, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(blobs / str(count))
        (folder / file.name).symlink_to(f"../../blobs/{count}")
    assert set(read_adapter(folder).parts[-1].changes)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    for file in folder.iterdir():
        (outside / file.name).symlink_to(file)
    message = r"is a link to .*put the file itself there" if saved_by == "peft" else "is not a regular file"
    with pytest.raises(BundleError, match=message):
        read_adapter(outside)
    (folder / TENSORS).resolve().rename(tmp_path / "moved")
    (folder / TENSORS).unlink()
    (folder / TENSORS).symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match=message):
        read_adapter(folder)


def test_an_adapter_that_is_saved_anew_meanwhile_is_read_once(program: Program, tmp_path: Path) -> None:
    """The proof of the pass compares with what the pass read, not with what the folder holds by then."""
    first, other = with_delta(program, LoRA(r=2)), with_delta(program, LoRA(r=3))
    first.save_delta(str(tmp_path / "trec"))

    class Saving(LoadDelta):
        def run(self, program: Program, context: Context) -> Program:
            after = super().run(program, context)
            other.save_delta(str(tmp_path / "trec"))
            return after

    again = bg.Pipeline([Saving("trec")]).run(program, resources={"trec": tmp_path / "trec"})
    assert torch.equal(again(**tokens())["logits"], first(**tokens())["logits"])


def test_files_of_peft_that_are_written_while_they_are_read_are_told(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "trec"
    with_delta(program, LoRA(r=2)).save_delta(str(folder))
    (folder / "manifest.json").unlink()
    real = peft_format.read_tensors

    def replaced(source: Any) -> dict[str, torch.Tensor]:
        (folder / "new").write_bytes((folder / CONFIG).read_bytes())
        (folder / "new").rename(folder / CONFIG)
        return real(source)

    monkeypatch.setattr(peft_format, "read_tensors", replaced)
    with pytest.raises(
        BundleError, match=r"adapter_config\.json.* was written anew while .* was read: load it again"
    ):
        read_adapter(folder)


def test_ranks_and_scales_that_differ_and_two_on_one_module(program: Program, tmp_path: Path) -> None:
    tuned = with_delta(program, LoRA(r=3), LoRA(r=2, alpha=5, roles=("feedforward.up",)), LoRA(r=4))
    tuned.save_delta(str(tmp_path / "trec"))
    config = json.loads((tmp_path / "trec" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == 7  # two deltas, concatenated
    assert config["rank_pattern"] == {"^blocks.0.up": 2, "^blocks.1.up": 2}
    assert config["alpha_pattern"] == {"^blocks.0.up": 5, "^blocks.1.up": 5}
    again = loaded(program, tmp_path / "trec")
    assert relative_error(again(**tokens())["logits"], tuned(**tokens())["logits"]) < EXACT


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_reads_what_we_write(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, program = captured(name)
    targets = ("*.q_proj", "*.down_proj") if name == "llama" else ("*.c_attn", "*.mlp.c_proj")
    tuned = with_delta(program, LoRA(r=3, targets=targets[:1]), LoRA(r=2, alpha=3, targets=targets[1:]))
    tuned.save_delta(str(tmp_path / "ours"))
    theirs = peft.PeftModel.from_pretrained(BY_NAME[name].build(), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        expected = theirs(**program.example).logits
    assert relative_error(tuned(**program.example)["logits"], expected) < EXACT


@pytest.mark.parametrize("options", [{"alpha_pattern": {"v_proj": 5}}, {"use_rslora": True}])
def test_we_read_what_peft_writes(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    _, program = captured("llama")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], **options)
    theirs = peft.get_peft_model(BY_NAME["llama"].build(), config)
    for key, item in theirs.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(item, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs.eval()(**program.example).logits
    tuned = loaded(program, tmp_path / "theirs")
    assert relative_error(tuned(**program.example)["logits"], expected) < EXACT


def test_a_tied_head_goes_by_the_name_of_its_module(tmp_path: Path) -> None:
    program = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    tuned = with_delta(program, LoRA(r=2, targets=("head",)))
    tuned.save_delta(str(tmp_path / "trec"))
    assert set(read_adapter(tmp_path / "trec").parts[-1].changes) == {"head"}
    again = loaded(program, tmp_path / "trec")
    assert torch.equal(again(**program.example)["output"], tuned(**program.example)["output"])


def test_the_backbone_is_known_by_its_fingerprint(program: Program, tmp_path: Path) -> None:
    assert program.fingerprint == fingerprint(dict(tiny_encoder().named_parameters()))
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    assert small.fingerprint == program.fingerprint
    small.save(str(tmp_path / "small"))
    assert bg.load(tmp_path / "small").fingerprint == program.fingerprint
    tuned = with_delta(small)
    tuned.save_delta(str(tmp_path / "trec"))
    loaded(program, tmp_path / "trec")
    loaded(small, tmp_path / "trec")
    for other in (
        bg.capture(tiny_encoder(seed=1), tokens()),
        bg.Pipeline([Merge()]).run(with_delta(program)),
    ):
        with pytest.raises(PassError, match=r"trained on another backbone \(.*this one is"):
            loaded(other, tmp_path / "trec")


def test_other_shapes_without_a_fingerprint_are_refused(program: Program, tmp_path: Path) -> None:
    with_delta(program).save_delta(str(tmp_path / "trec"))
    (tmp_path / "trec" / "manifest.json").unlink()
    wide = bg.capture(tiny_encoder(width=64), tokens())
    with pytest.raises(
        PassError, match=r"for another backbone: at blocks.0.q .* 32 x 32, the program's is 64 x 64"
    ):
        loaded(wide, tmp_path / "trec")
    flat = bg.capture(tiny_encoder(layers=1), tokens())
    with pytest.raises(
        PassError, match=r"changes 'blocks.1.q', which is not a linear of the program; near it: .*\.q"
    ):
        loaded(flat, tmp_path / "trec")


def test_what_the_format_cannot_say_is_refused(program: Program, tmp_path: Path) -> None:
    folder = str(tmp_path / "trec")
    with pytest.raises(InputError, match="no delta to save"):
        program.save_delta(folder)
    with pytest.raises(
        InputError, match=r"on all cannot be saved: .*some outputs of a linear.*targets=\('all',\)"
    ):
        with_delta(fused()[1], LoRA(roles=("attention.q",))).save_delta(folder)
    alone = bg.capture(nn.Linear(4, 4), (torch.randn(3, 4),))
    with pytest.raises(InputError, match=r"delta on weight cannot be saved"):
        with_delta(alone, LoRA(r=1, targets=("*",))).save_delta(folder)
    assert not (tmp_path / "trec").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "OFT"}, "type 'OFT': only LORA"),
        ({"use_dora": True}, "lora_A and lora_B of .*: expected lora_A and lora_B and lora_magnitude"),
        ({"bias": "some"}, "bias='some'"),
        ({"modules_to_save": "head"}, "modules_to_save='head': expected a list"),
        ({"lora_of_tomorrow": {"x": 1}}, "lora_of_tomorrow=.*not known here"),
        ({"kasa_config": {"x": 1}}, "kasa_config="),
        ({"alpha_pattern": {r"q\d": 4}}, "pattern 'q"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"lora_alpha": "16"}, "lora_alpha='16': expected a number"),
        ({"alpha_pattern": {"(a+)+x": 4}}, r"pattern '\(a\+\)\+x'"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    program: Program, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with_delta(program).save_delta(str(tmp_path / "trec"))
    (tmp_path / "trec" / "manifest.json").unlink()
    config = json.loads((tmp_path / "trec" / CONFIG).read_text())
    (tmp_path / "trec" / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(BundleError, match=message):
        loaded(program, tmp_path / "trec")


def _spoil(folder: Path, how: str) -> None:
    data = (folder / TENSORS).read_bytes()
    if how == "truncated":
        (folder / TENSORS).write_bytes(data[:-10])
    elif how == "altered":
        (folder / TENSORS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "no tensors":
        (folder / TENSORS).unlink()
    elif how == "no config":
        (folder / CONFIG).write_text("[")
    else:
        size = struct.unpack("<Q", data[:8])[0]
        (folder / TENSORS).write_bytes(data[: 8 + size].replace(b"lora_A", b"lora_C") + data[8 + size :])


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("how", ["truncated", "altered", "no tensors", "no config", "foreign names"])
def test_corrupt_adapters_are_refused(program: Program, tmp_path: Path, how: str, ours: bool) -> None:
    with_delta(program).save_delta(str(tmp_path / "trec"))
    if not ours:
        (tmp_path / "trec" / "manifest.json").unlink()
    _spoil(tmp_path / "trec", how)
    if how == "altered" and not ours:
        loaded(program, tmp_path / "trec")  # a foreign folder has no checksums, so a changed value loads
        return
    with pytest.raises(BundleError) as caught:
        loaded(program, tmp_path / "trec")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "trec") in str(caught.value)


def test_resources_that_are_not_adapters_are_refused(program: Program, tmp_path: Path) -> None:
    for given, message in (
        (None, "needs the resource 'trec'"),
        (3, "is a int: give the path"),
        ("nowhere", "nowhere is not an adapter: it has no adapter_config.json"),
    ):
        with pytest.raises(BmgraphError, match=message):
            bg.Pipeline([LoadDelta("trec")]).run(program, resources={"trec": given})
    program.save(str(tmp_path / "program"))
    with pytest.raises(BundleError, match="holds a program, not a delta"):
        loaded(program, tmp_path / "program")
    with_delta(program).save_delta(str(tmp_path / "trec"))
    with pytest.raises(BundleError, match=r"holds a delta: .*LoadDelta"):
        bg.load(tmp_path / "trec")


class TwoTied(nn.Module):
    """Two linears that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu())


def test_tied_linears_have_a_delta_each(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    program = bg.capture(TwoTied(), {"x": x})
    tuned = with_delta(program, LoRA(r=2, alpha=4, targets=("one",)))
    tuned.save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    file = tmp_path / "d" / TENSORS
    factors = {key: torch.randn_like(value) for key, value in read_tensors(file).items()}
    assert len(factors) == 4  # PEFT reads a delta by the name of each module
    alone = {key: value for key, value in factors.items() if ".two." in key}

    def expected(factors: dict[str, torch.Tensor]) -> torch.Tensor:
        y = x
        for module in ("one", "two"):
            weight = program.parameters["one.weight"]
            prefix = f"base_model.model.{module}.lora_"
            if f"{prefix}A.weight" in factors:
                weight = weight + 2 * factors[f"{prefix}B.weight"] @ factors[f"{prefix}A.weight"]
            y = nn.functional.linear(y, weight)
            y = y.relu() if module == "one" else y
        return y

    for kept in (factors, alone):
        write_tensors(file, kept)
        once = loaded(program, tmp_path / "d")
        assert relative_error(once(x=x)["output"], expected(kept)) < EXACT
        rows = bg.Pipeline([Deltas(("d",))]).run(program, resources={"d": tmp_path / "d"})
        assert relative_error(rows(x=x, delta="d")["output"], expected(kept)) < EXACT


def test_a_dot_in_a_pattern_is_any_character(program: Program, tmp_path: Path) -> None:
    with_delta(program).save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    config = json.loads((tmp_path / "d" / CONFIG).read_text())
    for pattern, scaled in (
        ("blocks.0.q", 1),
        ("blocks_0.q", 0),
        (r"0\.q", 1),
        ("^0.q", 0),
        ("0xq", 0),
        ("b.+q", None),
    ):
        (tmp_path / "d" / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {pattern: 99}}))
        if scaled is None:
            with pytest.raises(BundleError, match="only module paths"):
                read_adapter(tmp_path / "d")
            continue
        changes = read_adapter(tmp_path / "d").parts[-1].changes
        assert sum(change.numbers["scale"] == 33 for change in changes.values()) == scaled, pattern


def test_dropouts_that_differ_are_not_saved(program: Program, tmp_path: Path) -> None:
    tuned = with_delta(program, LoRA(r=3), LoRA(r=2, dropout=0.1))
    with pytest.raises(InputError, match=r"dropouts 0.0, 0.1 cannot be saved"):
        tuned.save_delta(str(tmp_path / "trec"))


def test_a_frozen_delta_stays_frozen_and_names_are_free(program: Program, tmp_path: Path) -> None:
    once = with_delta(program, LoRA(r=2))
    once.frozen |= {name for name in once.parameters if "_lora_" in name}
    twice = bg.Pipeline([LoRA(r=2)]).run(once)
    assert all("_lora_2_" in name for name in set(twice.parameters) - twice.frozen)
    once.parameters["blocks.0.q.weight_lora_2_b"] = torch.zeros(1)
    assert LowRank().free_stem(once, "blocks.0.q.weight") == "blocks.0.q.weight_lora_3"


def test_replay_needs_the_same_contents_wherever_they_lie(program: Program, tmp_path: Path) -> None:
    with_delta(program).save_delta(str(tmp_path / "trec"))
    loaded(program, tmp_path / "trec").save(str(tmp_path / "tuned"))
    (tmp_path / "trec").rename(tmp_path / "moved")
    replay_in_a_fresh_process(
        tmp_path / "tuned",
        "from tests.helpers.models import tiny_encoder",
        "tiny_encoder()",
        f", resources={{'trec': {str(tmp_path / 'moved')!r}}}",
    )
    trained(with_delta(program), seed=3).save_delta(str(tmp_path / "other"))
    with pytest.raises(ResourceError, match="'trec' is not the one that"):
        bg.replay(tmp_path / "tuned", program, resources={"trec": tmp_path / "other"})


def test_a_loaded_delta_is_merged_and_lowered(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    tuned = with_delta(program)
    tuned.save_delta(str(tmp_path / "trec"))
    plain = bg.Pipeline([Merge()]).run(loaded(program, tmp_path / "trec"))
    batch = tokens(4, 9, 6)
    assert relative_error(plain(**batch)["logits"], tuned(**batch)["logits"]) < EXACT
    engine = bg.compile(program, [LoadDelta("trec")], backend="onnx", resources={"trec": tmp_path / "trec"})
    assert relative_error(engine(**batch)["logits"], tuned(**batch)["logits"]) < 1e-4
