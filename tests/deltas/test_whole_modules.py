"""Modules that train whole beside a delta: trained, saved, loaded, as PEFT does it, and what would be lost is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.peft_format import CONFIG, TENSORS
from bmgraph.errors import BundleError, InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, LoadDelta, LoRA, Merge, Prune, Quantize
from bmgraph.serialize.safetensors_io import read_tensors, write_tensors
from bmgraph.verify.metrics import relative_error
from tests.helpers.deltas import Tied, trained
from tests.helpers.models import tokens

HEAD = {"head.weight", "head.bias"}


def loaded(program: Program, folder: Path) -> Program:
    """The program with the delta of a folder on it."""
    return bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": folder})


def with_head(program: Program) -> Program:
    return trained(bg.Pipeline([LoRA(r=2, modules_to_save=("head",))]).run(program))


def tied(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})


def test_a_head_trains_and_is_saved_with_the_delta(program: Program, tmp_path: Path) -> None:
    tuned = with_head(program)
    assert {name for name in set(tuned.parameters) - tuned.frozen if "_lora_" not in name} == HEAD
    tuned.save(str(tmp_path / "program"))
    tuned = bg.load(tmp_path / "program")
    tuned.save_delta(str(tmp_path / "d"))
    config = json.loads((tmp_path / "d" / CONFIG).read_text())
    assert config["modules_to_save"] == ["head"]
    again = loaded(program, tmp_path / "d")
    assert torch.equal(again(**tokens())["logits"], tuned(**tokens())["logits"])
    assert again.frozen == tuned.frozen
    assert again.trained_whole == HEAD
    small = bg.Pipeline([Merge()]).run(again)
    assert relative_error(small(**tokens())["logits"], tuned(**tokens())["logits"]) < 1e-5
    assert not small.trained_whole
    assert small.frozen >= HEAD


def test_a_head_that_became_codes_is_not_left_untrained_in_silence(program: Program) -> None:
    from bmgraph.training.joint_graph import trace_step

    codes = bg.Pipeline([Quantize("int8", activations="none")]).run(with_head(program))
    with pytest.raises(InputError, match=r"head.weight was to train whole .* train before that pass"):
        trace_step(codes, _sum_of_logits)
    others = Quantize("int8", activations="none", exclude=("head",))
    trace_step(bg.Pipeline([others]).run(with_head(program)), _sum_of_logits)


def _sum_of_logits(
    outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs["logits"].sum(), torch.ones(())


def test_a_trainer_keeps_the_backbone_of_a_delta_with_a_head(program: Program, tmp_path: Path) -> None:
    from bmgraph.backends import AdamW, Torch

    batch = {**tokens(), "labels": torch.tensor([1, 2, 3])}

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            scores = self.head(self.body(x).relu())
            return {"loss": nn.functional.cross_entropy(scores, labels), "scores": scores}

    batch = {"x": torch.randn(4, 6), "labels": torch.tensor([1, 2, 0, 1])}
    plain = bg.capture(Classifier(), batch)
    tuned = bg.Pipeline([LoRA(r=2, targets=("body",), modules_to_save=("head",))]).run(plain)
    trainer = bg.compile(tuned, backend=Torch(optimizer=AdamW(lr=1e-2)))
    trainer.step(batch)
    trainer.save_delta(tmp_path / "d")
    again = loaded(plain, tmp_path / "d")
    assert torch.equal(again(**batch)["scores"], trainer.program()(**batch)["scores"])
    assert not torch.equal(again.parameters["head.weight"], plain.parameters["head.weight"])


def test_trained_weights_that_would_be_lost_are_told(program: Program, tmp_path: Path) -> None:
    tuned = trained(bg.Pipeline([LoRA(r=2)]).run(program))
    tuned.frozen -= HEAD
    with pytest.raises(
        InputError, match=r"head.weight, head.bias are not frozen.*modules_to_save=\('head',\)"
    ):
        tuned.save_delta(str(tmp_path / "d"))
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(with_head(program))
    with pytest.raises(InputError, match=r"head.weight was trained with the delta and is not a tensor"):
        small.save_delta(str(tmp_path / "d"))


def test_a_tied_module_gets_a_copy_of_its_own(tmp_path: Path) -> None:
    program = tied()
    for name, other in (("head.weight", "embed.weight"), ("embed.weight", "head.weight")):
        folder = tmp_path / name
        tuned = trained(
            bg.Pipeline([LoRA(r=2, targets=("mid",), modules_to_save=(name.split(".")[0],))]).run(program)
        )
        assert not tuned.ties
        assert torch.equal(tuned.parameters[other], program.parameters["embed.weight"])
        tuned.save_delta(str(folder))
        again = loaded(program, folder)
        assert torch.equal(again(**program.example)["output"], tuned(**program.example)["output"])
        assert again.trained_whole == {name}


def test_copies_of_the_backbone_that_peft_saves_are_taken(program: Program, tmp_path: Path) -> None:
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=("head",))]).run(program))
    tuned.save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    prefix = "base_model.model."
    kept = {key: value.clone() for key, value in read_tensors(tmp_path / "d" / TENSORS).items()}
    same = {f"{prefix}head.base_layer.weight": program.parameters["head.weight"]}
    write_tensors(tmp_path / "d" / TENSORS, kept | same)
    again = loaded(program, tmp_path / "d")
    assert torch.equal(again(**tokens())["logits"], tuned(**tokens())["logits"])
    other = torch.randn(24, 32)
    write_tensors(tmp_path / "d" / TENSORS, kept | {f"{prefix}head.base_layer.weight": other})
    again = loaded(program, tmp_path / "d")
    assert torch.equal(again.parameters["head.weight"], other)
    assert again.fingerprint != program.fingerprint
    write_tensors(tmp_path / "d" / TENSORS, kept | {f"{prefix}embed.lora_embedding_A": torch.randn(2, 50)})
    with pytest.raises(BundleError, match=r"holds '.*embed.lora_embedding_A': a delta on an embedding"):
        loaded(program, tmp_path / "d")


def test_what_does_not_fit_is_told(program: Program, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"modules_to_save='hed' fits no module.*near it: head"):
        bg.Pipeline([LoRA(modules_to_save=("hed",))]).run(program)
    with_head(program).save_delta(str(tmp_path / "d"))
    with pytest.raises(PassError, match=r"delta 'd' in .* changes head.bias, head.weight whole"):
        bg.Pipeline([Deltas(("d",))]).run(program, resources={"d": tmp_path / "d"})
    small = bg.Pipeline([Quantize("int8", activations="none")]).run(program)
    with pytest.raises(PassError, match=r"holds a value of 'head.weight', which is not a tensor"):
        loaded(small, tmp_path / "d")
    with pytest.raises(PassError, match=r"head.weight_codes holds int8 codes"):
        bg.Pipeline([LoRA(modules_to_save=("head",))]).run(small)


def test_a_pruned_head_is_saved_pruned(program: Program, tmp_path: Path) -> None:
    pruned = bg.Pipeline([Prune(include=("head",))]).run(with_head(program))
    assert "head.weight_mask" in pruned.parameters
    pruned.save_delta(str(tmp_path / "d"))
    again = loaded(program, tmp_path / "d")
    assert torch.equal(again(**tokens())["logits"], pruned(**tokens())["logits"])


def test_a_head_is_not_loaded_under_the_mask_of_another(program: Program, tmp_path: Path) -> None:
    with_head(program).save_delta(str(tmp_path / "d"))
    before = bg.Pipeline([Prune(include=("head",))]).run(program)
    with pytest.raises(
        PassError, match=r"'head.weight', of which this program is pruned .* load the delta before Prune"
    ):
        loaded(before, tmp_path / "d")
    first = bg.Pipeline([Prune(include=("head",)), LoRA(r=2, modules_to_save=("head",))]).run(program)
    first.save_delta(str(tmp_path / "pruned"))
    again = loaded(before, tmp_path / "pruned")
    assert torch.equal(again(**tokens())["logits"], first(**tokens())["logits"])
