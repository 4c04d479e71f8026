"""Prune on every zoo architecture: values equal naive pruning, roles unchanged, and declined sites."""

from __future__ import annotations

import pytest

import bmgraph as bg
from bmgraph.passes import Prune
from tests.helpers.captured import NAMES, TOLERANCE, captured, distance
from tests.passes.test_prune import most_in_a_group, weights

QUICK = ("bert", "gpt2", "llama")

TIED = "something else reads its weight too (a tied embedding)"
DECLINED = {
    **{name: [TIED] for name in ("gpt2", "opt", "gemma", "gemma2", "falcon", "bloom", "t5", "t5_gated")},
    "mamba": ["its 2 inputs are not a multiple of 4"] * 2 + [TIED],
}
"""Sites that stay dense: heads tied to the embeddings, projections of two inputs."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_prune_works(name: str) -> None:
    _, program = captured(name)
    pruned = bg.Pipeline([Prune()]).run(program)
    record = pruned.history[-1]
    assert pruned.structure().roles == program.structure().roles
    sites = {edit.site for edit in record.edits}
    dense = weights(program)
    for site, weight in weights(pruned).items():
        if site in sites:
            assert most_in_a_group(weight) == 2
        assert bool(((weight == dense[site]) | (weight == 0)).all())
    by_hand = program.clone()
    for site in sites:
        by_hand.parameters[site] = program.parameters[site] * pruned.parameters[f"{site}_mask"]
    found = pruned(**program.example)
    for key, value in by_hand(**program.example).items():
        assert distance(found[key], value) < TOLERANCE, key
    assert len(sites) >= 4
    assert [edit.what for edit in record.declined] == DECLINED.get(name, [])
