"""Shrink on every zoo architecture: uneven heads and feed-forwards equal the zeroed model, roles unchanged."""

from __future__ import annotations

import pytest

import bmgraph as bg
from bmgraph.errors import PassError
from bmgraph.ir.program import Program
from bmgraph.passes import Shrink
from tests.helpers.captured import NAMES, TOLERANCE, batches, captured, distance
from tests.helpers.shrunk import with_zeros
from tests.helpers.zoo import BY_NAME
from tests.passes.test_shrink import silenced

QUICK = ("bert", "llama", "t5")

NOTHING = ("mamba", "mamba2")
"""Architectures with neither heads nor feed-forwards."""

DECLINED = {"deberta_v2": "reads a mask or positions along a dimension of no fixed size"}
"""Architecture -> why its attentions are declined."""

NORMS_OVER_HEADS = {"olmo2": 1e-3}
"""Architectures with a norm over all heads -> tolerance: the zeroed model's norm has another effective epsilon."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_shrunk_equals_zeroed(name: str) -> None:
    _, program = captured(name)
    item = Shrink(ffn=0.25, heads=0.5, scope="global")
    if name in NOTHING:
        with pytest.raises(
            PassError, match=r"changed nothing.*(neurons are not known|no site of the program fits it)"
        ):
            bg.Pipeline([item]).run(program)
        return
    small = bg.Pipeline([item]).run(program)
    record, before, after = small.history[-1], program.structure(), small.structure()
    reason = DECLINED.get(name)
    assert len(record.declined) == (len(before.attentions) if reason else 0)
    assert all(reason in edit.what for edit in record.declined if reason)
    assert after.roles == before.roles
    assert sum(dense.features for dense in after.feedforwards) == 0.75 * sum(
        dense.features for dense in before.feedforwards
    )
    if not reason:
        assert sum(item.heads for item in after.attentions) == 0.5 * sum(
            item.heads for item in before.attentions
        )
    silent = silenced(program, small)
    if name in NORMS_OVER_HEADS:
        silent = with_norms_over_the_rest(silent, small)
    for batch in batches(BY_NAME[name]):
        found = small(**batch)
        for key, value in silent(**batch).items():
            assert distance(found[key], value) < NORMS_OVER_HEADS.get(name, TOLERANCE), key


def with_norms_over_the_rest(silent: Program, small: Program) -> Program:
    """Rescale norms over all heads: in the zeroed model they average over removed features too."""
    for name, tensor in small.parameters.items():
        old = silent.parameters[name]
        if old.shape == tensor.shape:
            continue
        if tensor.dim() == 1:
            silent.parameters[name] = old * (len(tensor) / len(old)) ** 0.5
        elif not old.shape[1] > tensor.shape[1]:
            silent.parameters[name] = with_zeros(old, tensor)
    return silent
