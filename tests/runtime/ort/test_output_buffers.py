"""Output buffers are reused only after all references to them are gone."""

from __future__ import annotations

import threading

import numpy as np
import torch

from bmgraph.ir.program import Program
from bmgraph.runtime.ort.output_buffers import Buffers
from tests.helpers.models import tokens


def test_memory_in_use_is_not_handed_out() -> None:
    buffers, dtype = Buffers(), np.dtype(np.float32)
    first = buffers.take((2, 3), dtype)
    place = first.ctypes.data
    second = buffers.take((2, 3), dtype)
    assert second.ctypes.data != place
    view = torch.from_numpy(first)[0]
    del first
    assert buffers.take((2, 3), dtype).ctypes.data != place
    del view
    assert buffers.take((2, 3), dtype).ctypes.data == place


def test_results_of_earlier_calls_stay(program: Program) -> None:
    import bmgraph as bg

    engine = bg.compile(program, backend="onnx")
    batches = [tokens(2, 5, seed) for seed in range(6)]
    kept = [engine(**batch)["logits"] for batch in batches]
    for batch, result in zip(batches, kept):
        assert torch.allclose(engine(**batch)["logits"], result, atol=1e-6)


def test_threads_do_not_share_a_result(program: Program) -> None:
    import bmgraph as bg

    engine = bg.compile(program, backend="onnx")
    wrong = []

    def work(seed: int) -> None:
        batch = tokens(2, 5, seed)
        expected = program(**batch)["logits"]
        results = (engine(**batch)["logits"] for _ in range(30))
        wrong.extend(seed for result in results if not torch.allclose(result, expected, atol=1e-4))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
