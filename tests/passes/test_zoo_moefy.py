"""MoEfy on every zoo architecture: runs or gives a reason, keeps roles, and is exact with all experts active."""

from __future__ import annotations

from functools import cache

import pytest

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.pass_record import Record
from bmgraph.ir.program import Program
from bmgraph.passes import MoEfy
from tests.helpers.captured import NAMES, batches, captured
from tests.helpers.zoo import BY_NAME

EXACT = 1e-5
QUICK = ("bert", "llama", "mamba")

UNKNOWN = "whose neurons are not known"
DECLINED = {"mixtral": "no site of the program fits it", "mamba": UNKNOWN, "mamba2": UNKNOWN}
"""Architectures without a dense feed-forward -> the message."""


@cache
def parted(name: str, active: int, router: str) -> Program:
    """An architecture after MoEfy."""
    item = MoEfy(16, active, router=router)
    return bg.Pipeline([item]).run(captured(name)[1], calibration=batches(BY_NAME[name]))


def record(name: str, active: int, router: str = "trained") -> Record:
    """The record of the pass."""
    return parted(name, active, router).history[-1]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_runs_or_says_why_not(name: str) -> None:
    if name in DECLINED:
        with pytest.raises(PassError, match=f"changed nothing.*{DECLINED[name]}"):
            record(name, 4)
        return
    before, after = captured(name)[1].structure(), parted(name, 4, "trained").structure()
    assert len(record(name, 4).edits) == BY_NAME[name].expected.feedforwards
    assert not record(name, 4).declined
    assert {site: after.role(site) for site in before.roles} == before.roles
    assert len(after.layers) == len(before.layers)
    assert sum(group.split for group in after.experts) == len(before.feedforwards)
    assert (record(name, 16, "random").drift or 0.0) < EXACT


@pytest.mark.parametrize("name", ["llama", pytest.param("t5_gated", marks=pytest.mark.slow)])
def test_an_engine_equals_its_program(name: str) -> None:
    program = parted(name, 4, "trained")
    engine = bg.compile(program, passes=[], backend="onnx")
    for batch in batches(BY_NAME[name]):
        found, wanted = engine(**batch), program(**batch)
        assert all(
            float((found[key] - wanted[key]).norm()) < 1e-4 * float(wanted[key].norm()) for key in wanted
        )
