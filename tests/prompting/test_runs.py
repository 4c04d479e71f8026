"""Tasks from zero-shot to tuning: measures against naive counts, the best step, batches that go on, texts."""

from __future__ import annotations

import sys
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import SGD, AdamW, Torch
from bmgraph.errors import BackendError, InputError
from bmgraph.passes import ZeRO
from bmgraph.prompting import FewShot, Generate, Measures, Template, TextMeasures
from bmgraph.prompting.class_counts import ClassCounts
from bmgraph.training.evaluation_graph import trace_evaluation
from bmgraph.training.joint_graph import trace_step
from tests.helpers.models import tiny_decoder
from tests.helpers.prompted_models import ROWS, captured_fills, task_of_words
from tests.helpers.prompting import byte_tokenizer
from tests.helpers.ranks import run_ranks
from tests.helpers.words import captured_words

MORE = [{"text_a": f"w{index} w{index * 7 % 20}", "label": index % 2} for index in range(18)]
SGD_OF = partial(SGD, momentum=0.0)


def naive(found: list[str], expected: list[str]) -> dict[str, float]:
    """Accuracy and F1 counted row by row."""
    pairs, scores = list(zip(found, expected)), []
    for name in sorted({*found, *expected}):
        true = pairs.count((name, name))
        precision = true / found.count(name) if name in found else 0.0
        recall = true / expected.count(name) if name in expected else 0.0
        scores.append(2 * precision * recall / (precision + recall) if true else 0.0)
    accuracy = sum(one == other for one, other in pairs) / len(pairs)
    return {"accuracy": accuracy, "macro_f1": sum(scores) / len(scores), "micro_f1": accuracy}


@cache
def few() -> Any:
    """A run on two rows of each class."""
    return bg.run_task(
        captured_fills(), task_of_words(), backend=Torch(optimizer=SGD_OF(lr=0.5)), train=MORE, test=ROWS,
        few_shot=FewShot(per_class=2, valid=1, seed=1), steps=2, batch_size=4, verify="off",
    )  # fmt: skip


def test_an_evaluation_measures_what_an_engine_classifies() -> None:
    task, run = task_of_words(), few()
    found = run.trainer.evaluate(task.batches(MORE, 5), measure=task.measure)
    expected = naive(run.engine.classify(MORE), [task.classes[row["label"]] for row in MORE])
    assert found.measures == pytest.approx(expected)
    assert 0.0 < found.measures["accuracy"] < 1.0
    assert (found.count, found.batches) == (18, 4)
    measures = run.engine.measure(MORE)
    assert {name: getattr(measures, name) for name in expected} == pytest.approx(expected)


def _measured(rank: int) -> list[float]:
    task = task_of_words()
    trainer = bg.compile(
        captured_fills(), passes=[ZeRO(3)], backend=Torch(optimizer=SGD_OF(lr=0.5), loss=task.loss)
    )
    for _ in range(2):
        trainer.step(task.batch(MORE))
    found = trainer.evaluate(task.batches(MORE[:17], 4), measure=task.measure)  # a last batch of one row
    return [found.loss, *found.measures.values()]


@pytest.mark.slow
def test_ranks_measure_what_one_does() -> None:
    one, other = run_ranks(2, _measured)
    assert one == other
    task = task_of_words()
    trainer = bg.compile(captured_fills(), backend=Torch(optimizer=SGD_OF(lr=0.5), loss=task.loss))
    for _ in range(2):
        trainer.step(task.batch(MORE))
    found = trainer.evaluate(task.batches(MORE[:17], 4), measure=task.measure)
    assert one == pytest.approx([found.loss, *found.measures.values()], rel=1e-5)


@pytest.mark.slow
def test_a_run_ends_at_its_best_step(tmp_path: Path) -> None:
    task, train = task_of_words(), MORE[4:]
    backend = Torch(optimizer=SGD_OF(lr=2.0))
    run = bg.run_task(
        captured_fills(), task, backend=backend, train=train, valid=MORE[:4], test=ROWS, steps=8, batch_size=5, eval_every=2,
        patience=2, save=tmp_path / "run", seed=3, verify="off",
    )  # fmt: skip
    assert run.trainer is not None
    assert run.best is not None
    assert run.trainer.steps == run.best.step
    assert isinstance(run.valid, Measures)
    assert run.valid.accuracy == run.best.value
    plain = bg.compile(
        captured_fills(), backend=Torch(optimizer=backend.optimizer, loss=task.loss), verify="off"
    )
    plain.fit(task.batches(train, 5, seed=3), run.best.step)
    for name, value in plain.program().parameters.items():
        assert torch.equal(value, run.trainer.program().parameters[name])
    assert run.test == run.engine.measure(ROWS)


def test_zero_shot_is_the_model_as_it_is_and_calibration_comes_last() -> None:
    task, program = task_of_words(), captured_fills()
    run = bg.run_task(program, task, test=MORE, verify="off")
    engine = bg.compile(program, backend="torch", resources={"task": task}, verify="off")
    assert (run.test, run.valid, run.best) == (engine.measure(MORE), None, None)
    calibrated = bg.run_task(program, task, test=MORE, calibrate=["", "w0"], verify="off")
    engine.calibrate(["", "w0"])
    assert calibrated.test == engine.measure(MORE)


def test_a_few_rows_of_each_class_are_drawn() -> None:
    run = few()
    train, valid = FewShot(per_class=2, valid=1, seed=1).sample(MORE)
    assert run.valid == run.engine.measure(valid)
    assert run.test == run.engine.measure(ROWS)
    assert run.best.path is None
    assert run.best.step == run.trainer.steps
    assert run.valid.accuracy == run.best.value
    assert (run.fitted.evaluation.count, len(train)) == (2, 4)


def test_batches_are_shuffled_in_each_epoch_and_go_on() -> None:
    task = task_of_words()

    def ids(batches: Any) -> list[list[list[int]]]:
        return [batch["input_ids"].tolist() for batch in batches]

    loader = task.batches(MORE, 4, seed=5)
    first, same = ids(loader), ids(loader)
    loader.set_epoch(1)
    assert first == same != ids(loader)
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 2]
    assert ids(task.batches(MORE, 4)) == [
        task.batch(MORE[place : place + 4])["input_ids"].tolist() for place in (0, 4, 8, 12, 16)
    ]
    begun, again = iter(loader), task.batches(MORE, 4, seed=5)
    left = ids(loader)
    for _ in range(2):
        next(begun)
    again.load_state_dict(loader.state_dict())
    assert ids(again) == left[2:]
    with pytest.raises(InputError, match="is no position in 5 batches"):
        again.load_state_dict({"epoch": 0, "taken": 6})


def test_texts_are_measured_by_libraries_that_are_told_where_they_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, expected = ["the cat sat", "no "], ["the cat sat down", "no"]
    assert TextMeasures.of(found, expected) == TextMeasures(0.5, {})
    for name, score in (("rouge_score", "rouge"), ("sacrebleu", "bleu")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(BackendError, match=r"which is not installed: pip install 'bmgraph\[metrics\]'"):
            TextMeasures.of(found, expected, [score])
    told: Any = ModuleType("sacrebleu")
    told.corpus_bleu = lambda given, references: SimpleNamespace(score=len(given) + len(references))
    monkeypatch.setitem(sys.modules, "sacrebleu", told)
    assert TextMeasures.of(found, expected, ["bleu"]).scores == {"bleu": 3.0}


def test_scores_are_those_of_the_libraries() -> None:
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    found, expected = ["the cat sat down", "a b c d"], ["the cat sat up", "a b c d"]
    scores = TextMeasures.of(found, expected, ["rouge", "bleu"]).scores
    assert scores["rouge1"] == pytest.approx((3 / 4 + 1) / 2)
    assert scores["rouge2"] == pytest.approx((2 / 3 + 1) / 2)
    assert 0 < scores["bleu"] < 100
    assert TextMeasures.of(found, found, ["bleu"]).scores["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: bg.run_task(captured_fills(), task_of_words()), "there are no rows"),
        (lambda: bg.run_task(captured_fills(), task_of_words(), test=ROWS, steps=3), "steps= is for training: give train="),
        (lambda: bg.run_task(captured_fills(), task_of_words(), train=ROWS), "need backend=Torch\\(optimizer=...\\) and steps="),
        (lambda: bg.run_task(captured_fills(), "sst2"), "the task is a str: give a Classify or a Generate"),  # type: ignore[arg-type]
        (lambda: bg.run_task(captured_fills(), task_of_words(), test=ROWS, scores=["bleu"]), "they measure the texts of a Generate"),
        (lambda: bg.run_task(captured_fills(), writing(), test=ROWS, calibrate=[""]), "calibrate= is of classes: give it with a Classify"),
        (lambda: bg.run_task(captured_fills(), writing(), test=ROWS, max_new_tokens=0), "max_new_tokens=0: give a number of tokens"),
        (lambda: task_of_words().batches(ROWS, 0), "size=0: give a number of rows"),
        (lambda: task_of_words().batches([]), "there are no rows"),
        (lambda: TextMeasures.of(["a"], ["a"], ["blue"]), "did you mean 'bleu'"),
        (lambda: TextMeasures.of(["a"], []), "1 texts were written, and 0 are expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()


WRITTEN: list[Any] = [{"text_a": "a", "target": "good"}, {"text_a": "b", "target": "bad"}]


def writing() -> Generate:
    template = Template('{"placeholder": "text_a"} is{"mask"}', byte_tokenizer(), {"eos": "<end>"})
    return Generate(template, names={"input_ids": "ids"})


def test_a_generation_trains_by_targets_and_is_judged_by_what_it_writes() -> None:
    """The run ends where the texts were best, which are those that the program writes without a cache."""
    task = writing()
    model = tiny_decoder(layers=1, width=16, vocabulary=task.vocabulary.size)
    captured = bg.capture(model, task.example(WRITTEN), prove=False, unread=task.loss.inputs)
    run = bg.run_task(
        captured, task, backend=Torch(optimizer=AdamW(lr=1e-2)), train=WRITTEN, valid=WRITTEN, test=WRITTEN[:1], steps=40,
        batch_size=2, eval_every=40, patience=1, max_new_tokens=3, verify="off",
    )  # fmt: skip
    assert run.best is not None
    assert run.trainer is not None
    assert (run.best.figure, run.best.step) == ("exact", run.trainer.steps)
    program, texts = run.trainer.program(), []
    for prompt in task.prompts(WRITTEN):
        ids = list(prompt)
        for _ in range(3):
            given = torch.tensor([ids])
            ids.append(
                int(
                    program(ids=given, attention_mask=torch.ones_like(given), targets=given)["output"][
                        0, -1
                    ].argmax()
                )
            )
        new = ids[len(prompt) :]
        end = task.vocabulary.special_named("<end>")
        texts.append(task.vocabulary.decode(new[: new.index(end)] if end in new else new).strip())
    assert run.valid == TextMeasures.of(texts, ["good", "bad"])
    assert isinstance(run.valid, TextMeasures)
    assert run.valid.exact == run.best.value > 0
    assert run.test == TextMeasures.of(texts[:1], ["good"])


def test_a_measure_needs_outputs() -> None:
    step = trace_step(captured_words(), "loss")
    measure = ClassCounts(lambda outputs, inputs: outputs["logits"], ["a", "b"])
    with pytest.raises(
        InputError, match="measure= reads the model's outputs, and this trainer minimises one of them"
    ):
        trace_evaluation(step, measure)
