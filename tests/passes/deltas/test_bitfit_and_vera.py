"""BitFit: the model's own biases train, missing ones are added. VeRA: equal to PEFT's. Both are merged exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import BitFit, LoadDelta, LoRA, Merge, Quantize, VeRA
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import TinyEncoder, tokens
from tests.helpers.peft_models import EXACT, check_with_peft, stirred


class Partly(nn.Module):
    """A norm and linears, of which one has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


@pytest.fixture(scope="module")
def partly() -> Program:
    torch.manual_seed(0)
    return bg.capture(Partly(), {"x": torch.randn(3, 5, 8)})


def trained(program: Program) -> set[str]:
    return set(program.parameters) - program.frozen


def test_biases_train_and_missing_ones_are_added(partly: Program, tmp_path: Path) -> None:
    assert trained(bg.Pipeline([BitFit()]).run(partly)) == {"norm.bias", "up.bias"}
    assert trained(bg.Pipeline([BitFit(targets=("norm",))]).run(partly)) == {"norm.bias"}
    assert trained(bg.Pipeline([BitFit(roles=("feedforward.up",))]).run(partly)) == {"up.bias"}
    fresh = bg.Pipeline([BitFit(add=True)]).run(partly)
    assert trained(fresh) == {"norm.bias", "up.bias", "down.weight_bitfit_shift"}
    x = partly.example["x"]
    assert torch.equal(fresh(x=x)["output"], partly(x=x)["output"])
    tuned = stirred(fresh)
    norm, up, shift = (
        tuned.parameters[name] for name in ("norm.bias", "up.bias", "down.weight_bitfit_shift")
    )
    p = partly.parameters
    inner = nn.functional.layer_norm(x, (8,), p["norm.weight"], norm) @ p["up.weight"].T + up
    assert relative_error(tuned(x=x)["output"], x + inner.relu() @ p["down.weight"].T + shift) < EXACT
    tuned.save_delta(str(tmp_path / "d"))
    again = bg.Pipeline([LoadDelta("d")]).run(partly, resources={"d": tmp_path / "d"})
    assert torch.equal(again(x=x)["output"], tuned(x=x)["output"])
    assert trained(again) == trained(tuned)
    merged = bg.Pipeline([Merge()]).run(again)
    assert set(merged.parameters) == {*p, "down.bias_merged"}
    assert relative_error(merged(x=x)["output"], tuned(x=x)["output"]) < EXACT


def test_the_own_biases_alone_are_saved_and_merged(partly: Program, tmp_path: Path) -> None:
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(partly)
    tuned = stirred(bg.Pipeline([BitFit()]).run(codes))
    tuned.save_delta(str(tmp_path / "d"))
    x = partly.example["x"]
    again = bg.Pipeline([LoadDelta("d")]).run(codes, resources={"d": tmp_path / "d"})
    assert torch.equal(again(x=x)["output"], tuned(x=x)["output"])
    merged = bg.Pipeline([Merge()]).run(again)
    assert not merged.trained_whole
    assert torch.equal(merged(x=x)["output"], tuned(x=x)["output"])
    bare = bg.capture(nn.Linear(4, 4, bias=False), (torch.randn(2, 4),))
    with pytest.raises(PassError, match=r"no bias of the model is chosen: BitFit\(add=True\)"):
        bg.Pipeline([BitFit()]).run(bare)
    with pytest.raises(PassError, match="targets='mron' fits no site"):
        bg.Pipeline([BitFit(targets=("mron",))]).run(partly)


def test_a_bias_that_two_linears_share_trains_for_both(tmp_path: Path) -> None:
    """As torch trains one parameter under two names; and so it is saved and loaded."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    x = torch.randn(2, 4)
    program = bg.capture(model, (x,), prove=False)
    for item in (
        BitFit(),
        LoRA(r=1, targets=("2",), bias="all"),
        LoRA(r=1, targets=("2",), bias="lora_only"),
    ):
        tuned = bg.Pipeline([item]).run(program)
        assert tuned.trained_whole == {"0.bias"}
        assert tuned.ties == program.ties != {}
        tuned = stirred(tuned)
        tuned.save_delta(str(tmp_path / str(item)))
        again = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / str(item)})
        given = {tuned.inputs[0].name: x}
        assert torch.equal(again(**given)["output"], tuned(**given)["output"])
    module = stirred(bg.Pipeline([BitFit()]).run(program)).module()
    own = dict(module.named_parameters())["0.bias"].detach()
    with torch.no_grad():
        expected = (x @ model[0].weight.T + own).relu() @ model[2].weight.T + own
        assert torch.allclose(module(x)[0], expected, atol=1e-6)


@pytest.mark.slow
def test_vera_is_that_of_peft(model: TinyEncoder, program: Program, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned = stirred(bg.Pipeline([VeRA(r=4)]).run(program))
    assert len({delta.tensors["a"] for delta in deltas_of(tuned.graph)}) == 1
    check_with_peft(model, program, tuned, tmp_path, peft.VeraConfig(r=4, target_modules=["q", "v"]))
    merged = bg.Pipeline([Merge()]).run(tuned)
    assert relative_error(merged(**tokens())["logits"], tuned(**tokens())["logits"]) < EXACT


def test_vera_without_its_matrices_is_refused(program: Program, tmp_path: Path) -> None:
    from bmgraph.serialize.opened import open_user_file
    from bmgraph.serialize.safetensors_io import read_tensors, write_tensors

    fresh = bg.Pipeline([VeRA(r=2)]).run(program)
    assert torch.equal(fresh(**tokens())["logits"], program(**tokens())["logits"])
    fresh.save_delta(str(tmp_path / "d"))
    (tmp_path / "d" / "manifest.json").unlink()
    file = tmp_path / "d" / "adapter_model.safetensors"
    found = {name: value.clone() for name, value in read_tensors(open_user_file(file)).items()}
    del found["base_model.vera_A"]
    write_tensors(file, found)
    with pytest.raises(BundleError, match=r"holds no base_model\.vera_A.*save_projection=True"):
        bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / "d"})
