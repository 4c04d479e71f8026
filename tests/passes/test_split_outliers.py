"""SplitOutliers: exact splits, a narrower range afterwards, and no change without outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.target import Target
from bmgraph.passes import LoRA, Merge, Quantize, SplitOutliers
from bmgraph.verify.metrics import relative_error


class Forward(nn.Module):
    """A plain feed-forward."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up, self.activation, self.down = nn.Linear(64, 128), activation, nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.up(x)))


def _loud(activation: nn.Module) -> tuple[Program, torch.Tensor, nn.Module]:
    """A feed-forward with one outlier neuron."""
    torch.manual_seed(0)
    model = Forward(activation)
    with torch.no_grad():
        model.up.weight[7] *= 30
    x = torch.randn(200, 64)
    return bg.capture(model, {"x": x}), x, model


def test_neurons_behind_relu_are_split_exactly() -> None:
    program, x, _ = _loud(nn.ReLU())
    split = bg.Pipeline([SplitOutliers(least=1.0)]).run(program, calibration=[{"x": x}])
    assert split.history[-1].edits[0].site == "up.weight"
    assert split.parameters["up.weight"].shape[0] > 128
    assert relative_error(split(x=x)["output"], program(x=x)["output"]) < 1e-6


def test_channels_are_split_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32, bias=False), nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight[3], model[0].weight[9] = 40.0, -25.0
    x = torch.randn(100, 64)
    program = bg.capture(model, {"input": x})
    split = bg.Pipeline([SplitOutliers(share=0.1, noise=0.01)]).run(program, calibration=[{"input": x}])
    assert "copies of its input channels" in split.history[-1].edits[0].what
    assert relative_error(split(input=x)["output"], program(input=x)["output"]) < 1e-5


def test_int8_is_nearer_with_it() -> None:
    program, x, _ = _loud(nn.GELU())
    errors = []
    for outliers in (False, True):
        item = Quantize("int8", activations="static", outliers=outliers)
        errors.append(bg.Pipeline([item]).run(program, calibration=[{"x": x}]).history[-1].drift or 0.0)
    assert errors[1] < 0.8 * errors[0]


def test_nothing_stands_out_nothing_changes() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 64)
    program = bg.capture(Forward(nn.ReLU()), {"x": x})
    same = bg.Pipeline([SplitOutliers()]).run(program, calibration=[{"x": x}])
    assert not same.history[-1].edits
    assert str(same) == str(program)


def test_bad_options_and_missing_data_are_refused() -> None:
    with pytest.raises(InputError, match="share=2"):
        SplitOutliers(share=2.0)
    with pytest.raises(ResourceError, match="calibration"):
        bg.Pipeline([SplitOutliers()]).run(_loud(nn.ReLU())[0])


class Dropped(nn.Module):
    """Two linears that read one value, the second behind dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(64), nn.Dropout(0.5)
        self.plain, self.dropped = nn.Linear(64, 32), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3] = 60.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.plain(x).tanh() + self.dropped(self.drop(x)).tanh()


WIDE = SplitOutliers(share=0.1, noise=0.01)


def test_a_linear_behind_dropout_keeps_its_dropout() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 64)
    split = bg.Pipeline([WIDE]).run(bg.capture(Dropped(), {"x": x}), calibration=[{"x": x}])
    assert [edit.site for edit in split.history[-1].edits] == ["plain.weight", "dropped.weight"]
    train = split.module(training=True)
    assert not torch.equal(train(x)[0], train(x)[0])


class Work(TorchDispatchMode):
    """Counts the elements that operators return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.elements += sum(leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor))
        return made


@pytest.mark.parametrize("peak", [1e20, 1e36])
def test_a_huge_peak_is_no_more_work(peak: float) -> None:
    work = []
    for scale in (1.0, peak):
        torch.manual_seed(0)
        model = Forward(nn.ReLU())
        with torch.no_grad():
            model.up.weight.mul_(scale)
            model.down.weight.mul_(1 / scale)
        x = torch.randn(50, 64)
        program = bg.capture(model, {"x": x})
        with Work() as counted:
            split = bg.Pipeline([SplitOutliers()]).run(program, calibration=[{"x": x}])
        work.append(counted.elements)
        assert not split.history[-1].edits
    assert 0 < work[1] <= 2 * work[0]  # not in proportion to the peak


def test_a_bias_that_two_linears_share_is_widened_for_one_only() -> None:
    program, x, model = _loud(nn.ReLU())
    model.other = nn.Linear(64, 128)
    model.other.bias = model.up.bias
    model.forward = lambda x: model.down(model.activation(model.up(x))) + model.other(x)[..., :64]
    program = bg.capture(model, {"x": x})
    split = bg.Pipeline([SplitOutliers(least=1.0)]).run(program, calibration=[{"x": x}])
    assert split.history[-1].edits[0].site == "up.weight"
    assert relative_error(split(x=x)["output"], program(x=x)["output"]) < 1e-6


def test_what_it_adds_behind_lora_stays_frozen_and_merge_declines_a_widened_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32, bias=False), nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight[3] = 60.0
    x = torch.randn(100, 64)
    tuned = bg.Pipeline([LoRA(r=2, targets=("1",)), WIDE]).run(
        bg.capture(model, {"input": x}), calibration=[{"input": x}]
    )
    assert tuned.history[-1].edits
    assert set(tuned.parameters) - tuned.frozen == {"1.weight_lora_a", "1.weight_lora_b"}
    with pytest.raises(
        PassError, match=r"1.weight: its weight has \d+ inputs and the delta 64, .*: merge before it"
    ):
        bg.Pipeline([Merge()]).run(tuned)


def test_globs_leave_linears_alone() -> None:
    program, x, _ = _loud(nn.ReLU())
    for options in ({"include": ("down",)}, {"exclude": ("up",)}):
        item = Quantize("int8", activations="static", **options)
        small = bg.Pipeline([item]).run(program, calibration=[{"x": x}])
        assert torch.equal(small.parameters["up.weight"], program.parameters["up.weight"])
    with pytest.raises(PassError, match="near it: up"):
        bg.Pipeline([SplitOutliers(include=("upp",))]).run(program, calibration=[{"x": x}])


def test_a_target_that_takes_multiples_gets_neurons_of_zeros() -> None:
    program, x, _ = _loud(nn.GELU())
    item, given = SplitOutliers(least=1.0), [{"x": x}]
    plain = bg.Pipeline([item]).run(program, calibration=given)
    filled = bg.Pipeline([item]).run(program, calibration=given, target=Target("wide", neurons=16))
    count = len(plain.parameters["up.weight"])
    assert len(filled.parameters["up.weight"]) == -(-count // 16) * 16 > count
    assert filled.parameters["down.weight"].shape[1] == len(filled.parameters["up.bias"])
    assert relative_error(filled(x=x)["output"], plain(x=x)["output"]) < 1e-6
