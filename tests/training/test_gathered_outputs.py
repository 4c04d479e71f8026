"""A contrastive loss over the rows of all ranks is that of one plain process on the whole batch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BmgraphError, InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Remat, ZeRO
from bmgraph.runtime.training.trainer import Trainer
from tests.helpers.ranks import run_ranks

F = nn.functional
Batch = dict[str, torch.Tensor]
RATE, STEPS = 0.5, 4
NAMES = ("image", "text")


class Pairs(nn.Module):
    """Two towers and a trained temperature, as CLIP has them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.words = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)), nn.Linear(7, 6)
        self.scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> Batch:
        """pixels f[B, 5], ids f[B, 7] -> image f[B, 6], text f[B, 6], scale f[]."""
        image, text = F.normalize(self.vision(pixels), dim=-1), F.normalize(self.words(ids), dim=-1)
        return {"image": image, "text": text, "scale": self.scale.exp()}


def clip(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions of the N x N logits, summed over the N pairs."""
    logits = outputs["scale"] * outputs["image"] @ outputs["text"].T
    labels = torch.arange(logits.shape[0])
    total = F.cross_entropy(logits, labels, reduction="sum") + F.cross_entropy(
        logits.T, labels, reduction="sum"
    )
    return total / 2, torch.ones_like(labels).sum()


def mean_clip(outputs: Batch, inputs: Batch) -> torch.Tensor:
    total, count = clip(outputs, inputs)
    return total / count


def supervised(outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Own images against all texts; those of the same kind are positives."""
    logits = outputs["image"] @ outputs["text"].T * 3
    same = inputs["kind"][:, None] == inputs["kinds"][None]
    return -(logits.log_softmax(1) * same).sum(), same.sum()


class Kinds(Pairs):
    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, kind: torch.Tensor, kinds: torch.Tensor
    ) -> Batch:
        """As `Pairs`, with the kind of each row twice: own and gathered."""
        return super().forward(pixels, ids)


def batch(seed: int, rows: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixels": torch.randn(rows, 5, generator=generator),
        "ids": torch.randn(rows, 7, generator=generator),
    }


def with_kinds(seed: int) -> Batch:
    kind = torch.arange(8) % 3
    return {**batch(seed), "kind": kind, "kinds": kind}


@cache
def captured(kinds: bool = False) -> Program:
    torch.manual_seed(0)
    return bg.capture(Kinds() if kinds else Pairs(), with_kinds(0) if kinds else batch(0))


def plain(loss: Any, kinds: bool = False) -> list[float]:
    torch.manual_seed(0)
    model = Kinds() if kinds else Pairs()
    rule = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for seed in range(STEPS):
        given = with_kinds(seed) if kinds else batch(seed)
        rule.zero_grad()
        found = loss(model(**given), given)
        value = found[0] / found[1] if isinstance(found, tuple) else found
        value.backward()
        rule.step()
        losses.append(value.item())
    return losses


def trainer_of(
    *passes: Any, loss: Any = clip, gather: Any = NAMES, kinds: bool = False, **options: Any
) -> Trainer:
    backend = Torch(optimizer=SGD(lr=RATE), loss=loss, gather=gather, **options)
    made: Trainer = bg.compile(captured(kinds).clone(), passes=passes, backend=backend)
    return made


def told(call: Any, *args: Any, **options: Any) -> str:
    try:
        call(*args, **options)
    except BmgraphError as error:
        return str(error)
    return ""


def on_ranks(rank: int, size: int, stage: int, more: bool) -> dict[str, Any]:
    trainer = trainer_of(Remat("auto") if stage == 1 else Remat("none"), ZeRO(stage))
    found: dict[str, Any] = {
        "notes": "".join(trainer.report.notes),
        "compared": trainer.report.records[-1].compared,
    }
    assert trainer.plan.sent
    found["evaluated"] = trainer.evaluate([batch(0), batch(1)]).loss
    found["whole"] = [trainer.step(batch(seed)).loss for seed in range(STEPS)]
    found["parameters"] = trainer.program().parameters
    found["uneven"] = told(trainer.step, batch(0, rows=2 * size + 1))
    found["not evaluated"] = told(trainer.evaluate, [batch(0, rows=1)])
    found["not gathered"] = told(trainer_of, ZeRO(stage), gather=())
    if stage == 3:
        inside = trainer_of(ZeRO(3), optimizer_in_backward=True)
        found["in backward"] = [inside.step(batch(seed)).loss for seed in range(STEPS)]
    if more:
        found |= with_more_trainers(rank, size, stage)
    if rank:
        trainer.gradients._runner._module.register_forward_pre_hook(_fail)
    found["failing"] = told(trainer.step, batch(0))
    return found


def with_more_trainers(rank: int, size: int, stage: int) -> dict[str, Any]:
    """Rows of each rank's own with a mean for loss, and own rows against gathered ones."""
    found: dict[str, Any] = {}
    own = trainer_of(ZeRO(stage), loss=mean_clip, batch="rank")
    share = 8 // size
    rows = [
        {key: value[rank * share : (rank + 1) * share] for key, value in batch(seed).items()}
        for seed in range(STEPS)
    ]
    found["own"] = [own.step(item).loss for item in rows]
    found["own uneven"] = told(own.step, batch(0, rows=2 + rank))
    mixed = trainer_of(ZeRO(stage), loss=supervised, gather=("text", "kinds"), kinds=True)
    found["mixed"] = [
        (result.loss, result.count) for result in (mixed.step(with_kinds(seed)) for seed in range(STEPS))
    ]
    return found


def _fail(module: nn.Module, args: Any) -> None:
    raise InputError("planted")


@pytest.mark.parametrize(
    ("size", "stage", "more"),
    [
        (2, 3, False),
        pytest.param(2, 1, True, marks=pytest.mark.slow),
        pytest.param(4, 2, True, marks=pytest.mark.slow),
    ],
)
def test_ranks_have_the_loss_of_the_whole_batch(size: int, stage: int, more: bool) -> None:
    expected, alone = plain(clip), trainer_of()
    torch.manual_seed(0)
    model = Pairs()
    with torch.no_grad():
        evaluated = sum(float(mean_clip(model(**batch(seed)), batch(seed))) for seed in (0, 1)) / 2
    assert [alone.step(batch(seed)).loss for seed in range(STEPS)] == pytest.approx(expected, rel=1e-6)
    for found in run_ranks(size, on_ranks, size, stage, more):
        assert found["whole"] == pytest.approx(expected, rel=1e-6)
        assert found.get("in backward", found["whole"]) == found["whole"]
        assert found["evaluated"] == pytest.approx(evaluated, rel=1e-6)
        for name, value in alone.program().parameters.items():
            assert torch.allclose(found["parameters"][name], value, atol=1e-6), name
        assert found["compared"] == "loss and 7 gradients on 8x5"
        assert "reads the rows of all ranks of 'image', 'text'" in found["notes"]
        assert "no multiple of" in found["uneven"]
        assert "no multiple of" in found["not evaluated"]
        assert "Torch(gather=" in found["not gathered"]
        assert "planted" in found["failing"]
        if more:
            assert found["own"] == pytest.approx(plain(mean_clip), rel=1e-6)
            assert "equally many" in found["own uneven"]
            losses = [loss for loss, _ in found["mixed"]]
            assert losses == pytest.approx(plain(supervised, kinds=True), rel=1e-6)
            assert {count for _, count in found["mixed"]} == {22}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 2}, "accumulate=2: each micro-batch would be contrasted with itself alone"),
        ({"loss": "image"}, "give loss= a function of"),
        ({"gather": ("pictures",)}, "there is no output or input 'pictures'"),
        ({"gather": ("image", "scale")}, "'scale' is a scalar, which has no rows"),
        ({"gather": 3}, "give the names of outputs"),
    ],
)
def test_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer_of(**options)


def own_mean(outputs: Batch, inputs: Batch) -> torch.Tensor:
    return (outputs["image"] @ outputs["text"].T).square().mean()


@pytest.mark.parametrize(
    ("loss", "gather", "message"),
    [
        (clip, "image", "it fails on more rows of these than of others"),
        (own_mean, "text", "rows meet in aten.mean.default"),
    ],
)
def test_what_does_not_add_up_over_ranks_is_refused(loss: Any, gather: Any, message: str) -> None:
    backend = Torch(optimizer=SGD(lr=RATE), loss=loss, gather=gather)
    with pytest.raises(InputError, match=message):
        bg.plan(captured(), [ZeRO(3)], backend=backend, world_size=2)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> Batch:
        """x f[B, 5] -> views f[2 B, 6]: all first ones, then all second ones."""
        return {"views": torch.cat([self.layer(x), self.layer(x * 2)])}


def test_rows_out_of_order_are_refused() -> None:
    program = bg.capture(Views(), {"x": torch.randn(4, 5)})
    backend = Torch(
        optimizer=SGD(lr=RATE), loss=lambda o, i: (o["views"] @ o["views"].T).mean(), gather="views"
    )
    with pytest.raises(InputError, match="'views' cannot be gathered: its first axis does not hold one row"):
        bg.plan(program, [ZeRO(3)], backend=backend, world_size=2)


def test_one_name_needs_no_tuple() -> None:
    assert Torch(optimizer=SGD(), loss=clip, gather="image").gather == ("image",)
