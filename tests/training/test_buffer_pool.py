"""Pooled buffers: used again once nothing reads them, also while a backend's thread still holds what it was lent."""

from __future__ import annotations

import torch

from bmgraph.training.buffer_pool import BufferPool

CPU = torch.device("cpu")


def test_a_buffer_is_used_again_when_its_last_view_is_gone() -> None:
    pool = BufferPool()
    first = pool.take(6, torch.float32, CPU)
    view, address = first[2:], first.data_ptr()
    del first
    assert pool.take(6, torch.float32, CPU).data_ptr() != address
    del view
    assert {pool.take(6, torch.float32, CPU).data_ptr() for _ in range(4)} <= {
        buffer.data_ptr() for buffer in pool._buffers
    }
    assert pool.nbytes == 2 * 24


def test_what_is_lent_shares_the_memory_and_does_not_hold_the_buffer() -> None:
    pool = BufferPool()
    taken = pool.take(6, torch.bfloat16, CPU).view(3, 2)
    lent = pool.lent(taken[1:])
    lent.copy_(torch.arange(4.0).view(2, 2))
    assert taken[1:].tolist() == [[0, 1], [2, 3]]
    assert lent.dtype == torch.bfloat16
    address = taken.data_ptr()
    del taken
    assert pool.take(6, torch.bfloat16, CPU).data_ptr() == address
    other = torch.ones(3)
    assert pool.lent(other) is other
