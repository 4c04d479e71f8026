"""Soft verbalizers: trained rows of the head equal a plain torch loop, are saved beside deltas, and serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.errors import InputError, PassError
from bmgraph.passes import ClassRows, LoadDelta, LoRA
from bmgraph.prompting import Classify, SoftVerbalizer, Template
from bmgraph.verify.metrics import relative_error
from tests.helpers.prompted_models import ROWS, captured_fills, fills
from tests.helpers.prompting import SPECIAL, WORDS, word_tokenizer


def task_of() -> Classify:
    template = Template('{"placeholder": "text_a"} : {"mask"} .', word_tokenizer(), SPECIAL)
    words = {"positive": ["great", "good"], "negative": "bad"}
    return Classify(template, SoftVerbalizer(words, template.vocabulary), padding="right")


def test_rows_of_classes_train_as_a_plain_loop_and_serve() -> None:
    task, model = task_of(), fills()
    assert isinstance(task.verbalizer, SoftVerbalizer)
    program = bg.Pipeline([ClassRows(task.verbalizer.words)]).run(captured_fills())
    assert [spec.name for spec in program.outputs] == ["class_scores"]
    assert set(program.parameters) - program.frozen == {"class_rows.weight", "class_rows.bias"}
    trainer: Any = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.5, momentum=0.0), loss=task.loss))
    batch = task.batch(ROWS)
    losses = [trainer.step(batch).loss for _ in range(3)]

    great, good, bad = (WORDS.index(word) for word in ("great", "good", "bad"))
    head = nn.Linear(16, 2)
    with torch.no_grad():
        for own, rows in ((head.weight, model.head.weight), (head.bias, model.head.bias)):
            own.copy_(torch.stack([(rows[great] + rows[good]) / 2, rows[bad]]))
    model.head = nn.Identity()  # type: ignore[assignment]
    model.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    labels, expected = torch.tensor([0, 1, 1, 0]), []
    for _ in range(3):
        optimizer.zero_grad()
        hidden = model(batch["input_ids"], batch["attention_mask"])["logits"]
        scores = head(hidden[torch.arange(4), batch["mask_positions"][:, 0]])
        loss = nn.functional.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    tuned = trainer.program()
    assert relative_error(tuned.parameters["class_rows.weight"], head.weight.detach()) < 1e-5
    engine: Any = bg.compile(tuned, backend="torch", resources={"task": task})
    texts = [row["text_a"] for row in ROWS]
    with torch.no_grad():
        scores = head(hidden[torch.arange(4), batch["mask_positions"][:, 0]])
    assert engine.classify(texts) == [task.classes[int(row.argmax())] for row in scores]


@pytest.mark.slow
def test_an_engine_is_saved_with_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    task = task_of()
    assert isinstance(task.verbalizer, SoftVerbalizer)
    program = bg.Pipeline([ClassRows(task.verbalizer.words)]).run(captured_fills())
    engine: Any = bg.compile(program, backend="onnx", resources={"task": task})
    engine.save(str(tmp_path / "engine"))
    batch = task.batch(ROWS)
    scores = program(**batch)["class_scores"][torch.arange(4), batch["mask_positions"][:, 0]]
    texts = [row["text_a"] for row in ROWS]
    assert bg.load(tmp_path / "engine").classify(texts) == [task.classes[int(row.argmax())] for row in scores]


def test_rows_are_saved_alone_and_beside_a_delta(tmp_path: Path) -> None:
    program = captured_fills()
    batch = program.example
    for name, passes in (
        ("alone", [ClassRows(((3,), ()))]),
        ("beside", [LoRA(r=2, targets="mix"), ClassRows(((3,), (4,)), keep=True)]),
    ):
        tuned = bg.Pipeline(passes).run(program)  # type: ignore[arg-type]
        tuned.save_delta(str(tmp_path / name))
        loaded = bg.Pipeline([LoadDelta("d")]).run(program, resources={"d": tmp_path / name})
        assert [spec.name for spec in loaded.outputs] == [spec.name for spec in tuned.outputs]
        for key, value in tuned(**batch).items():
            assert torch.equal(loaded(**batch)[key], value)


def test_bad_input_is_refused() -> None:
    program = captured_fills()
    for words, message in (((), "words="), (((1,),), "two classes"), (((1,), (-2,)), "from 0 on")):
        with pytest.raises(InputError, match=message):
            ClassRows(words)
    with pytest.raises(PassError, match="holds the id 999"):
        bg.Pipeline([ClassRows(((1,), (999,)))]).run(program)
    with pytest.raises(PassError, match="no head of words"):
        bg.Pipeline([ClassRows(((1,), (2,)))]).run(bg.capture(nn.Linear(4, 3), (torch.randn(3, 4),)))
    task = task_of()
    with pytest.raises(InputError, match="run the pass ClassRows"):
        task.scores({"class_scores": torch.zeros(1, 2, 3)}, torch.tensor([[0]]))
    with pytest.raises(InputError, match="no output 'class_scores'"):
        task.scores({"logits": torch.zeros(1, 2, 3)}, torch.tensor([[0]]))
