"""Freeze: what is named trains and nothing else, equal to requires_grad in plain PyTorch; what fits nothing is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Freeze, LoRA, Quantize
from tests.fixtures.write_checkpoints import Small, rows
from tests.helpers.deltas import Tied

LORA = {f"blocks.{layer}.q.weight_lora_{letter}" for layer in (0, 1) for letter in "ab"}


def left(program: Program, *except_: str, **options: Any) -> set[str]:
    done = bg.Pipeline([Freeze(except_, **options)]).run(program, verify="off")
    return set(done.parameters) - done.frozen


@pytest.mark.parametrize(
    ("except_", "options", "expected"),
    [
        (("head",), {}, {"head.weight", "head.bias"}),
        (("blocks.1.q", "head.bias"), {}, {"blocks.1.q.weight", "blocks.1.q.bias", "head.bias"}),
        (("blocks.?.q.weight",), {}, {"blocks.0.q.weight", "blocks.1.q.weight"}),
        ((r"re:blocks\.0\.[kv]\.bias",), {}, {"blocks.0.k.bias", "blocks.0.v.bias"}),
        ((), {"except_roles": "attention.o"},
         {f"blocks.{layer}.o.{end}" for layer in (0, 1) for end in ("weight", "bias")}),
    ],
)  # fmt: skip
def test_what_trains(except_: tuple[str, ...], options: Any, expected: set[str], program: Program) -> None:
    assert left(program, *except_, **options) == expected & set(program.parameters)


def test_deltas_stay_and_a_later_delta_tells(program: Program, tmp_path: Path) -> None:
    tuned = bg.Pipeline([LoRA(r=2, targets=("q",))]).run(program)
    assert left(tuned, "deltas") == LORA
    assert left(tuned, "deltas", "head.weight") == LORA | {"head.weight"}
    assert left(tuned, "re:.*lora_b") == {name for name in LORA if name.endswith("b")}
    with pytest.raises(InputError, match=r"head\.weight are not frozen"):
        bg.Pipeline([Freeze(("deltas", "head.weight"))]).run(tuned).save_delta(str(tmp_path / "d"))
    head = bg.Pipeline([Freeze(("head",))]).run(program)
    with pytest.warns(UserWarning, match=r"freeze\{except_=\[head\]\} let head.* train.*behind the delta"):
        assert set(bg.Pipeline([LoRA(r=2, targets=("q",))]).run(head).frozen) >= {"head.weight"}


def test_it_is_requires_grad_and_a_tied_parameter_is_one() -> None:
    torch.manual_seed(0)
    model = Small(nn.LayerNorm)
    program = bg.capture(model, rows(0))
    frozen = bg.Pipeline([Freeze(("norm", "hidden.bias"))]).run(program)
    trainer: Any = bg.compile(frozen, backend=Torch(optimizer=SGD(lr=0.5)))
    for seed in range(3):
        trainer.step(rows(seed))
    named = dict(model.named_parameters())
    for name, item in named.items():
        item.requires_grad_(name in ("norm.weight", "norm.bias", "hidden.bias"))
        item.data = item.data.clone()
    rule = torch.optim.SGD([item for item in named.values() if item.requires_grad], lr=0.5)
    for seed in range(3):
        rule.zero_grad()
        model(**rows(seed))["loss"].backward()
        rule.step()
    for name, value in trainer.program().parameters.items():
        assert torch.allclose(value, named[name], rtol=1e-5, atol=1e-7), name
    tied = bg.capture(Tied(), {"ids": torch.randint(0, 40, (3, 4))})
    assert left(tied, "head") == left(tied, "embed") == {"embed.weight"}


def test_what_cannot_be_named_is_told(program: Program) -> None:
    for except_, message in (
        ("heda", "except_='heda' fits no parameter and no module with parameters; near it: head"),
        ("re:q", "except_='re:q' fits no parameter"),
        ("deltas", "except_='deltas' fits no parameter"),
    ):
        with pytest.raises(PassError, match=message):
            left(program, except_)
    with pytest.raises(PassError, match=r"except_roles='attention\.z' fits no role; near it: attention"):
        left(program, except_roles="attention.z")
    with pytest.raises(InputError, match="nothing would train"):
        Freeze()
    codes = bg.Pipeline([Quantize("int8", activations="none", smallest=1)]).run(program)
    with pytest.raises(
        PassError, match=r"names blocks.0.q.weight_codes, int8 codes, which cannot be trained"
    ):
        left(codes, "blocks.0.q.weight*")
    declined = bg.Pipeline([Freeze(("blocks.0.*",))]).run(codes, verify="off").history[-1].declined
    assert "blocks.0.q.weight_scale" in {edit.site for edit in declined}
