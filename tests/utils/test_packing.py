"""Packed documents: a document's loss is that of the document alone."""

from __future__ import annotations

import pytest
import torch

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.utils.packing import PackedBatches
from tests.helpers.training import toy


def documents(sizes: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 99, (size,), generator=generator).tolist() for size in sizes]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_the_loss_of_a_document_is_that_of_it_alone(name: str) -> None:
    given = documents((5, 3, 7, 2))
    (batch,) = PackedBatches(given, length=9, rows=2)
    assert (batch["labels"] != -100).sum() == sum(map(len, given)) - len(given)
    model = toy(name).eval()
    program: Program = bg.capture(model, batch)
    found = program(**batch)
    total = torch.tensor(0.0)
    with torch.no_grad():
        for document in given:
            ids = torch.tensor([document])
            total += model(input_ids=ids, labels=ids).loss * (len(document) - 1)
    assert float(found["loss"]) * (17 - 4) == pytest.approx(float(total), rel=1e-5)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, 0] = 50 if batch["input_ids"][0, 0] != 50 else 51  # the first of two documents
    moved = (program(**other)["logits"] != found["logits"]).any(-1)
    assert moved[0].any()
    assert not moved[0, 5:].any()
    assert not moved[1].any()


def test_rows_are_filled_and_long_documents_cut() -> None:
    batches = list(PackedBatches(documents((4, 11, 4, 1, 2)), length=5, rows=2, shift=True))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (6, 5)  # 4, 5, 5, 4, 2 and padding
    kept = torch.cat([batch["labels"] for batch in batches]) != -100
    assert kept.sum(1).tolist() == [3, 4, 4, 3, 1, 0]
    first = batches[0]
    assert first["labels"][0, :3].tolist() == first["input_ids"][0, 1:4].tolist()
    assert first["attention_mask"].any(-1).all()  # padding attends to itself: no softmax of nothing


def test_order_ranks_and_position() -> None:
    given = documents(tuple(range(2, 14)))
    packed = PackedBatches(given, length=13, rows=1, seed=1)
    one = [batch["input_ids"] for batch in packed]
    assert all(torch.equal(*pair) for pair in zip(one, (batch["input_ids"] for batch in packed)))
    packed.set_epoch(1)
    assert not all(torch.equal(*pair) for pair in zip(one, (batch["input_ids"] for batch in packed)))
    ranks = [list(PackedBatches(given, 13, 1, seed=1, rank=rank, ranks=2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    shared = [batch["input_ids"] for pair in zip(*ranks) for batch in pair]
    assert all(torch.equal(*pair) for pair in zip(one, shared))
    packed.set_epoch(0)
    iterator = iter(packed)
    next(iterator)
    again = PackedBatches(given, 13, 1, seed=1)
    again.load_state_dict(packed.state_dict())
    assert all(torch.equal(*pair) for pair in zip(one[1:], (batch["input_ids"] for batch in again)))


def test_what_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="no document with 2 tokens or more"):
        PackedBatches([[1], []], 4, 2)
    with pytest.raises(InputError, match="rows=0: give 1 or more"):
        PackedBatches([[1, 2]], 4, 0)
