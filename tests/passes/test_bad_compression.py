"""Bad input of passes that compress: one clear error, which names what, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError, PassError, ResourceError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import CALIBRATION
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import (
    QAT,
    Distill,
    Fit,
    MoEfy,
    Prune,
    Quantize,
    Relufy,
    Shrink,
    Smooth,
    SplitOutliers,
)
from tests.helpers.models import tokens
from tests.helpers.sweep import sweep

X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


class Mix(nn.Module):
    """A feed-forward, and a linear that is far smaller."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.small = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)
        with torch.no_grad():
            self.small.weight *= 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x))) + self.small(x)


@cache
def mix() -> Program:
    return bg.capture(Mix(), {"x": X})


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@cache
def layers() -> Program:
    """Two layers that all passes of compression fit."""
    return bg.capture(Layers(), {"x": X})


def with_value(value: float) -> torch.Tensor:
    changed = X.clone()
    changed[1, 2] = value
    return changed


READERS: dict[str, Pass] = {
    "static": Quantize("int8", activations="static"),
    "entropy": Quantize("int8", activations="static", ranges="entropy"),
    "bias": Quantize("int8", activations="none", correct_bias=True),
    "awq": Quantize("int4", method="awq"),
    "gptq": Quantize("int4", method="gptq"),
    "quantease": Quantize("int4", method="quantease"),
    "mixed": Quantize("mixed", average=4.5),
    "smooth": Smooth(),
    "outliers": SplitOutliers(),
    "qat": QAT("int8", activations="static"),
    "wanda": Prune(score="wanda"),
    "sparsegpt": Prune(score="sparsegpt"),
    "activation": Shrink(ffn=0.25, score="activation"),
    "layers": Shrink(layers=0.5),
    "moefy": MoEfy(experts=4, active=2),
    "coactivation": MoEfy(experts=4, active=2, split="coactivation", router="similarity"),
    "relufy": Relufy(data=CALIBRATION, steps=2),
    "distill": Distill(data=CALIBRATION, on="outputs", steps=2),
    "fit": Fit(bytes="20KB", over=("shrink{ffn=0.25}",)),
}
"""Passes that read data, all of them that of the calibration here."""

TRAIN = ("relufy", "distill")
"""Those that train, and name what a step was given."""

NAMED = r"(not finite: 'x' \(1 of 512 values\)|input 'x' (NaN|infinite): repair)"

DATA: dict[str, tuple[object, str]] = {
    "empty": ([], "'calibration' holds no batch|calibration batch 0 does not fit"),
    "NaN": ([{"x": X}, {"x": with_value(float("nan"))}], "(calibration batch 1 makes the .*|loss of this batch is nan.*)" + NAMED),
    "infinite": ([{"x": with_value(float("inf"))}], "(calibration batch 0 makes the .*|loss of this batch is nan.*)" + NAMED),
    "of another width": (
        [{"x": torch.randn(8, 32)}], "(calibration|training) batch 0 .*input 'x' has size 32 at dimension 1",
    ),
    "without rows": ([{"x": torch.zeros(0, 64)}], "(calibration|training) batch 0 .*input 'x' has batch 0"),
    "missing": (None, "needs the resource 'calibration', which was not given"),
}  # fmt: skip
"""Data that no pass can use, and what is said."""


@pytest.mark.parametrize("name", sweep(READERS, READERS.keys() - {"relufy"}))
def test_data_that_is_missing_empty_or_not_finite(name: str) -> None:
    program = layers()
    text, weights = str(program), {key: value.clone() for key, value in program.parameters.items()}
    for kind, (given, said) in DATA.items():
        if (name, kind) == ("fit", "missing"):
            continue  # it measures on the example
        with pytest.raises(ResourceError if name not in TRAIN else (ResourceError, InputError), match=said):
            bg.Pipeline([READERS[name]]).run(
                program, calibration=given, max_drift=3.0, resources={"teacher": program}
            )
    assert str(program) == text
    assert all(torch.equal(program.parameters[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (lambda: Shrink(heads=1.0), "heads=1.0: leaves no head; give a share from 0 to below 1"),
        (lambda: Shrink(heads=-0.1), "heads=-0.1: that is no share; give a share from 0 to below 1"),
        (lambda: Quantize("int4", group=48), "group=48: kernels have groups of 16, 32"),
        (lambda: Prune("4:4"), "pattern='4:4': give N:M, such as 2:4, with N below M"),
        (lambda: Prune("unstructured", sparsity=1.0), "sparsity=1.0: give the share of zeros"),
    ],
)
def test_options_that_leave_nothing_or_do_not_divide(item: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        item()


def test_an_attention_with_one_head_left_keeps_it(program: Program) -> None:
    one = bg.Pipeline([Shrink(heads=0.99)]).run(program, max_drift=3.0)
    with pytest.raises(PassError, match=r"blocks\.0\.o\.weight: one of its heads is left, which stays"):
        bg.Pipeline([Shrink(heads=0.5)]).run(one, max_drift=3.0)


def test_sizes_that_a_pattern_does_not_divide() -> None:
    odd = bg.capture(nn.Linear(50, 30), (torch.randn(4, 50),))
    with pytest.raises(PassError, match=r"changed nothing .*its 50 inputs are not a multiple of 4"):
        bg.Pipeline([Prune("2:4")]).run(odd)
    padded = bg.Pipeline([Quantize("int4", group=64)]).run(odd)  # the last group is filled up
    assert padded(input=torch.randn(2, 50))["output"].shape == (2, 30)


@pytest.mark.parametrize("scope", ["global", "row"])
def test_a_site_that_would_be_pruned_to_nothing(scope: str) -> None:
    share = 0.8 if scope == "global" else 0.999
    where, asked = ("small", "0.8 of the weights of all linears") if scope == "global" else ("up", "0.999")
    with pytest.raises(
        PassError,
        match=rf"{where}\.weight: sparsity={asked} leaves none of its \d+ weights: ask for less, exclude it",
    ):
        bg.Pipeline([Prune("unstructured", sparsity=share, scope=scope)]).run(mix(), max_drift=3.0)


class Words(nn.Module):
    """A language model of so many words."""

    def __init__(self, words: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(words, 16), nn.Linear(16, words)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.embed(ids))}


@pytest.mark.parametrize("on", ["logits", "outputs", "cosine"])
def test_a_teacher_with_another_vocabulary(on: str) -> None:
    batch = {"ids": tokens()["ids"]}
    student = bg.capture(Words(50), batch)

    def distill(teacher: object) -> None:
        bg.Pipeline([Distill(on=on, steps=1)]).run(student, resources={"teacher": teacher, "text": [batch]})

    with pytest.raises(
        PassError,
        match="the teacher's logits are over 60 classes, the program's over 50: distill with on='hidden'",
    ):
        distill(Words(60))
    with pytest.raises(
        ResourceError,
        match=r"the teacher does not run on the first batch of the distillation data.*index out of range.*another vocabulary",
    ):
        distill(Words(3))
