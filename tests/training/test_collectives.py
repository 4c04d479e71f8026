"""The collectives of a step on gloo ranks, which exchange directly: values, the order of sums, and buffers that are used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bmgraph.distributed.process_group import Ranks
from bmgraph.training.collectives import Buffers, Collectives
from tests.helpers.ranks import run_ranks

SHARE, ROUNDS = 6, 8


def _values(size: int, round_: int) -> torch.Tensor:
    return torch.randn(size, SHARE * size, generator=torch.Generator().manual_seed(round_))


def _exchange(rank: int, size: int) -> dict[str, Any]:
    buffers, ranks = Buffers(), Ranks.here()
    calls = Collectives(torch.device("cpu"), buffers)
    held = []
    for round_ in range(ROUNDS):
        own = _values(size, round_)[rank]
        reduced = calls._reduce_scatter(own.clone(), "sum", size, ranks.group)  # two at once
        gathered = calls._gather(own[:SHARE].view(2, 3), size, ranks.group)
        whole, share = gathered.wait().clone(), reduced.wait().clone()
        del gathered, reduced
        expected = _values(size, round_)
        total = expected[0].clone()
        for row in expected[1:]:  # in the order of ranks
            total += row
        assert torch.equal(share, total[rank * SHARE : (rank + 1) * SHARE])
        assert torch.equal(whole, expected[:, :SHARE].reshape(-1, 3))
        held.append(buffers.nbytes)
    return {"held": held}


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 4))])
def test_few_ranks_exchange_directly(size: int) -> None:
    for found in run_ranks(size, _exchange, size):
        assert set(found["held"]) == {found["held"][0]}  # no buffer more after the first round
        assert found["held"][0] == 4 * SHARE * (size + 1 + size - 2)
