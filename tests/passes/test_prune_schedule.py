"""Prune while training: densities follow the cubic schedule at each update, through checkpoints, on ranks and in Distill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BundleError, InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.ir.step_rules import MaskSchedule
from bmgraph.passes import Distill, LoRA, Prune, Quantize, ZeRO
from bmgraph.passes.prune.patterns import lowest_share, sparsity_mask
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.bundles import edit_json
from tests.helpers.models import tiny_encoder, tokens
from tests.helpers.ranks import run_ranks

GROWS = Prune("unstructured", sparsity=0.8, begin=2, end=8, every=3)


def squares(
    outputs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs["logits"].square().sum(), torch.ones_like(outputs["logits"]).sum()


def batches(count: int = 10) -> list[dict[str, torch.Tensor]]:
    return [tokens(4, 8, seed) for seed in range(count)]


def trainer_of(item: Prune, *passes: Any, program: Program | None = None, **options: Any) -> Trainer:
    source = program or bg.capture(tiny_encoder(1), tokens(4, 8))
    config = Torch(optimizer=AdamW(lr=1e-2), loss=squares, **options)
    return bg.compile(source, passes=[item, *passes], example=tokens(4, 8), backend=config)


def masks(program: Program) -> dict[str, torch.Tensor]:
    return {name: item for name, item in program.buffers.items() if name.endswith("_mask")}


def test_densities_follow_the_cubic_schedule() -> None:
    trainer = trainer_of(GROWS)
    found = []
    for step, batch in enumerate(batches(), start=1):
        trainer.step(batch)
        program = trainer.program()
        zeros = [float((~mask).float().mean()) for mask in masks(program).values()]
        expected = 0.0 if step < 5 else 0.8 * (1 - (1 - 3 / 6) ** 3) if step < 8 else 0.8
        assert zeros == pytest.approx([expected] * len(zeros), abs=1e-3)
        found.append(expected)
        if step in (5, 8):  # of the weights that training has come to
            weight = program.parameters["blocks.0.up.weight"]
            assert torch.equal(
                program.buffers["blocks.0.up.weight_mask"], lowest_share(weight.abs(), expected, False)
            )
    assert sorted(set(found)) == pytest.approx([0.0, 0.7, 0.8])


def _trained(
    rank: int, folder: str, passes: tuple[Any, ...], first: int, options: dict[str, Any]
) -> tuple[str, dict[str, torch.Tensor]]:
    trainer = trainer_of(GROWS, *passes, program=bg.load(f"{folder}/program"), **options)
    if first:
        trainer.load(f"{folder}/ckpt")
    for batch in batches()[first:]:
        trainer.step(batch)
    return "", masks(trainer.program())


@pytest.mark.slow
def test_it_goes_on_from_a_checkpoint_and_on_ranks(tmp_path: Path) -> None:
    bg.capture(without_dropout(tiny_encoder(1)), tokens(4, 8)).save(tmp_path / "program")
    whole = _trained(0, str(tmp_path), (), 0, {})[1]
    trainer = trainer_of(GROWS, program=bg.load(tmp_path / "program"))
    for batch in batches()[:6]:
        trainer.step(batch)
    trainer.save(tmp_path / "ckpt")
    runs = [_trained(0, str(tmp_path), (), 6, {}), *run_ranks(2, _trained, str(tmp_path), (ZeRO(3),), 0, {})]
    runs += run_ranks(2, _trained, str(tmp_path), (ZeRO(1),), 6, {})
    for place, (_, found) in enumerate(runs):
        assert found.keys() == whole.keys()
        for name, mask in found.items():
            assert int(mask.sum()) == int(whole[name].sum())
            assert float((mask != whole[name]).float().mean()) < (1e-9 if place == 0 else 0.01), name
    for options in ({"accumulate": 2}, {"precision": "bf16"}, {"optimizer_in_backward": True}):
        found = _trained(0, str(tmp_path), (), 0, options)[1]
        assert {name: int(mask.sum()) for name, mask in found.items()} == {
            name: int(mask.sum()) for name, mask in whole.items()
        }


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.slow
def test_in_a_distillation_and_up_to_an_engine(tmp_path: Path) -> None:
    program, teacher = (bg.capture(tiny_encoder(seed), tokens(4, 8)) for seed in (1, 2))
    item = Prune("unstructured", sparsity=0.5, end=6, every=2, include=("*.up.weight", "*.down.weight"))
    given = {"teacher": teacher, "text": batches(), "trainer": Torch(optimizer=AdamW(lr=1e-2))}
    done = bg.Pipeline([item, Distill(steps=8)]).run(program, resources=given)
    assert {float(mask.float().mean()) for mask in masks(done).values()} == {0.5}
    done.save(tmp_path / "done")
    again = bg.load(tmp_path / "done")
    assert again.step_rules == done.step_rules
    # later training leaves what is pruned pruned
    more = bg.Pipeline([Distill(steps=3)]).run(again, resources=given)
    assert all(torch.equal(mask, masks(done)[name]) for name, mask in masks(more).items())
    assert not torch.equal(more.parameters["head.weight"], done.parameters["head.weight"])
    for passes in ([], [Quantize("int8", activations="none")]):
        engine = bg.compile(done, passes=passes, backend="onnx")
        assert torch.allclose(
            engine(**tokens(4, 8))["logits"], done(**tokens(4, 8))["logits"], atol=0.3 if passes else 1e-4
        )
    replayed = bg.replay(tmp_path / "done", program, resources=given)
    assert all(torch.equal(mask, masks(replayed)[name]) for name, mask in masks(done).items())
    edit_json(tmp_path / "done" / "program.json", lambda data: data["step_rules"][0].update({"sparsity": 3}))
    with pytest.raises(BundleError):
        bg.load(tmp_path / "done")


@pytest.mark.slow
@pytest.mark.parametrize(
    "item",
    [
        Prune("2:4", end=4, every=2),
        Prune("unstructured", sparsity=0.6, scope="global", initial=0.2, end=4),
        Prune("unstructured", sparsity=0.6, scope="row", end=4),
    ],
)
def test_patterns_and_scopes(item: Prune) -> None:
    """N falls from M; weights stored [in, out]; an initial share is pruned at once."""

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.zeros(8))
            self.head = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.head(torch.relu(torch.addmm(self.bias, x, self.weight)))}

    torch.manual_seed(0)
    x = torch.randn(6, 16)
    config = Torch(optimizer=AdamW(lr=1e-2), loss=squares)
    trainer = bg.compile(Stored(), passes=[item], example=(x,), backend=config)
    total = sum(mask.numel() for mask in masks(trainer.program()).values())
    before = sum(int((~mask).sum()) for mask in masks(trainer.program()).values())
    assert before == round(item.initial * total)
    for _ in range(5):
        trainer.step({"x": x})
    program = trainer.program()
    found = masks(program)
    if item.pattern == "2:4":
        for name, mask in found.items():
            weight = program.parameters[name.removesuffix("_mask")]
            turned = (weight.T, mask.T) if name.startswith("weight") else (weight, mask)
            assert (turned[1].reshape(len(turned[1]), -1, 4).sum(-1) == 2).all()
            assert turned[1].shape == sparsity_mask(turned[0].abs(), 2, 4).shape
    else:
        zeros = sum(int((~mask).sum()) for mask in found.values())
        assert zeros == pytest.approx(0.6 * total, abs=len(found) * 8)


def test_the_cubic_schedule() -> None:
    rule = MaskSchedule((("m", "w"),), "unstructured", "layer", 0.9, 0.1, 10, 110, 30)
    due = [step for step in range(200) if rule.is_due(step)]
    assert due == [10, 40, 70, 100, 110]
    assert [rule.share(step) for step in due] == pytest.approx(
        [0.9 - 0.8 * (1 - (step - 10) / 100) ** 3 for step in due]
    )
    assert rule.among({"w"}) is None


def test_bad_input_is_refused() -> None:
    for options, message in (
        ({"pattern": "unstructured", "every": 5}, "give end="),
        ({"pattern": "unstructured", "begin": 5, "end": 5}, "give steps with begin before end"),
        ({"pattern": "unstructured", "score": "wanda", "end": 5}, "by magnitude, and not transposable"),
        (
            {"pattern": "unstructured", "sparsity": 0.5, "initial": 0.5, "end": 5},
            "give a share of zeros below 0.5",
        ),
        ({"pattern": "2:4", "initial": 0.1, "end": 5}, "for pattern='unstructured' alone"),
    ):
        with pytest.raises(InputError, match=message):
            Prune(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_weights_that_are_computed_are_declined() -> None:
    adapted = bg.Pipeline([Quantize("int8", activations="none"), LoRA(r=2)]).run(
        bg.capture(tiny_encoder(1), tokens())
    )
    with pytest.raises(PassError, match="prune before that pass"):
        bg.Pipeline([GROWS]).run(adapted)
