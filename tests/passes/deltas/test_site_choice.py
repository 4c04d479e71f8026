"""Which linears get a delta: by glob, regular expression, role, layer, all of them, without the excluded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.deltas.registry import deltas_of
from bmgraph.errors import InputError, PassError
from bmgraph.ir.program import Program
from bmgraph.passes import LoRA, Quantize


def sites(program: Program, **options: Any) -> list[str]:
    tuned = bg.Pipeline([LoRA(r=1, **options)]).run(program, verify="off")
    return sorted({delta.site.removesuffix(".weight") for delta in deltas_of(tuned.graph)})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "blocks.0.q blocks.0.v blocks.1.q blocks.1.v"),
        ({"targets": "q"}, "blocks.0.q blocks.1.q"),
        ({"targets": r"re:blocks\.\d\.(q|o)"}, "blocks.0.o blocks.0.q blocks.1.o blocks.1.q"),
        ({"targets": "q", "layers": (1,)}, "blocks.1.q"),
        ({"targets": "q", "layers": 0}, "blocks.0.q"),
        ({"layers": ("-1:",)}, "blocks.1.q blocks.1.v"),
        ({"layers": "0:1", "roles": "attention.*"}, "blocks.0.k blocks.0.o blocks.0.q blocks.0.v"),
        ({"targets": "blocks.0", "exclude": ("up", "re:.*[kqv]")}, "blocks.0.down blocks.0.o"),
        ({"targets": "all-linear", "exclude": "blocks.1"},
         "blocks.0.down blocks.0.k blocks.0.o blocks.0.q blocks.0.up blocks.0.v"),
        ({"targets": ("all-linear", "head"), "layers": 1, "exclude": "re:.*[kqv]"}, "blocks.1.down blocks.1.o blocks.1.up"),
    ],
)  # fmt: skip
def test_what_is_chosen(options: dict[str, Any], expected: str, program: Program) -> None:
    assert sites(program, **options) == expected.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "blocks.0.dwon"}, "targets='blocks.0.dwon' fits no site; near it: blocks.0.down"),
        ({"targets": "re:x(.*"}, r"'re:x\(\.\*' is not a valid regular expression"),
        ({"targets": "re:q"}, "targets='re:q' fits no site; near it: blocks.0.q"),
        ({"exclude": "blocks.7"}, "exclude='blocks.7' fits no site; near it: "),
        ({"layers": 2}, "layers=2: the program has 2 layers, counted from 0"),
        ({"layers": "5:"}, "layers='5:': the program has 2 layers"),
        ({"roles": "attention.z"}, "roles='attention.z' fits no role; near it: attention"),
        ({"exclude": "*"}, "zero sites|nothing|no site|edited"),
    ],
)
def test_what_is_not_in_the_program_is_told(options: dict[str, Any], message: str, program: Program) -> None:
    with pytest.raises(PassError, match=message):
        sites(program, **options)


def test_wrong_options() -> None:
    for layers in ("a:b", "1:2:3", "3"):
        with pytest.raises(InputError, match="is no range: give numbers of layers"):
            LoRA(layers=layers)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="option 'layers' of LoRA"):
        LoRA(layers=(0.5,))  # type: ignore[arg-type]


def test_other_passes_take_regular_expressions_too(program: Program) -> None:
    quantize = Quantize("int8", activations="none", include=r"re:.*\.[qk]", smallest=1)  # type: ignore[arg-type]
    codes = bg.Pipeline([quantize]).run(program, verify="off")
    assert {edit.site for edit in codes.history[-1].edits} == {
        f"blocks.{layer}.{name}.weight" for layer in (0, 1) for name in "qk"
    }


def test_a_model_without_the_default_roles_is_told_what_it_has() -> None:
    """As a state-space model has none of them."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    program = bg.capture(model, (torch.randn(2, 6),))
    with pytest.raises(
        PassError,
        match=r"the default choice, attention\.q and attention\.v, fits no role of the model, which has linear: "
        "choose linears by targets, such as targets='all-linear'",
    ):
        sites(program)
    assert sites(program, targets="all-linear") == ["0", "2"]
