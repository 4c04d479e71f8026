"""Zero-shot by template on a trained model: the classes of a loop written by hand, exactly."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg


@pytest.mark.slow
def test_zero_shot_accuracy_is_that_of_a_loop_by_hand() -> None:
    from benchmarks.delta_data import Decoder, rows_of

    source, rows = Decoder(2), rows_of("movies", 1, 0, 60).test
    expected = torch.stack([source.by_hand(row["text_a"]) for row in rows])
    run = bg.run_task(source.model, source.task, test=rows, verify="structure")
    classes = [source.task.classes[index] for index in expected.argmax(-1).tolist()]
    assert run.engine.classify(rows) == classes
    assert run.test is not None
    assert run.test.accuracy == sum(int(one) == row["label"] for one, row in zip(classes, rows)) / len(rows)
    torch.testing.assert_close(run.engine.class_probabilities(rows), expected.exp(), rtol=1e-3, atol=1e-4)
