"""bg.plan: the plan of one of many ranks is that of the trainer that these ranks would have, without ranks or weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import bmgraph as bg
from bmgraph.backends import AdamW, Onnx, Torch
from bmgraph.errors import InputError
from bmgraph.passes import LoRA, ZeRO
from tests.training.test_step_plan import Deep, rows, trainer_of


def backend(**options: object) -> Torch[object]:
    return Torch(optimizer=AdamW(), clip_norm=1.0, **options)  # type: ignore[call-overload,no-any-return]


def test_of_one_rank_it_is_the_trainers_plan() -> None:
    with torch.device("meta"):
        model = Deep()
    planned = bg.plan(model, [ZeRO(3)], example=rows(120), backend=backend())
    found = trainer_of(120, ZeRO(3)).plan
    assert str(planned) == str(found)
    assert planned.timeline == found.timeline


def test_a_thousand_ranks_need_no_process_group() -> None:
    with torch.device("meta"):
        model = Deep()
    planned = bg.plan(model, [ZeRO(3)], example=rows(2048), backend=backend(), world_size=1024)
    assert planned.ranks == 1024
    assert planned.inputs == {"x": (2, 16), "labels": (2, 16)}
    whole = trainer_of(4).plan
    buckets = 3  # each padded to the ranks
    assert whole.parameters <= 1024 * planned.parameters <= whole.parameters + 4 * 1024 * buckets
    assert planned.state == 2 * planned.parameters
    assert not dist.is_initialized()


def test_passes_of_both_stages_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Deep()
    planned = bg.plan(
        model, [LoRA(r=2, targets=("*",)), ZeRO(2)], example=rows(8), backend=backend(), world_size=2
    )
    assert planned.state < planned.parameters / 2


def test_refusals() -> None:
    with pytest.raises(InputError, match="give a backend that trains"):
        bg.plan(Deep(), example=rows(4), backend=Onnx())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="world_size=0"):
        bg.plan(Deep(), example=rows(4), backend=backend(), world_size=0)
