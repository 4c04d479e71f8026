"""Tasks: training by their loss, classification by engines, and another process that serves a saved one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import bmgraph as bg
from bmgraph.api import Engine
from bmgraph.backends import SGD, Torch
from bmgraph.errors import BundleError, InputError
from bmgraph.passes import LoRA, Quantize, SoftPrompt
from bmgraph.prompting import Classify, Generate, PTRVerbalizer, Template, Verbalizer
from bmgraph.prompting.prompts import MODELS
from bmgraph.prompting.task_files import task_of
from tests.helpers.prompted_models import ROWS, captured_fills, fills, task_of_words
from tests.helpers.prompting import SPECIAL, WORDS, byte_tokenizer, numbered_tokenizer, word_tokenizer

TEXTS = [row["text_a"] for row in ROWS]


def by_hand(model: torch.nn.Module, text: str) -> torch.Tensor:
    """Scores of classes for one text without any code of tasks: log-probabilities of three words."""
    ids = [2, *(WORDS.index(word) for word in f"{text} : [MASK] .".split()), 3]
    given = torch.tensor([ids])
    logits = model(given, torch.ones_like(given))["logits"][0, ids.index(4)]
    found = torch.log_softmax(logits[[WORDS.index(word) for word in ("great", "good", "bad")]], 0)
    return torch.stack([found[:2].mean(), found[2]])


def test_training_minimises_the_loss_of_a_plain_loop() -> None:
    task, model = task_of_words(), fills()
    trainer = bg.compile(captured_fills(), backend=Torch(optimizer=SGD(lr=0.5, momentum=0.0), loss=task.loss))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    labels = torch.tensor([0, 1, 1, 0])
    for _ in range(3):
        loss = cross_entropy(torch.stack([by_hand(model, text) for text in TEXTS]), labels)
        assert trainer.step(task.batch(ROWS)).loss == pytest.approx(loss.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_model_that_takes_anything_is_not_given_what_the_loss_reads() -> None:
    task = task_of_words()
    trainer = bg.compile(
        fills(),
        example=task.batch(ROWS),
        backend=Torch(optimizer=SGD(lr=0.1, momentum=0.0), loss=task.loss, accumulate=2),
    )
    losses = [trainer.step(task.batch(ROWS)).loss for _ in range(3)]
    assert losses[2] < losses[0]
    engine = bg.compile(trainer.program(), backend="torch", resources={"task": task})
    assert len(engine.classify(TEXTS)) == 4


@pytest.mark.parametrize("padding", ["right", "left"])
def test_engines_classify_as_the_model_does(padding: str) -> None:
    task, model = task_of_words(padding), fills()
    engine = bg.compile(model, example=task.batch(TEXTS), backend="torch", resources={"task": task})
    expected = torch.stack([by_hand(model, text).softmax(-1) for text in TEXTS])
    torch.testing.assert_close(
        engine.class_probabilities(TEXTS, batch_size=3), expected, rtol=1e-5, atol=1e-6
    )
    names = [task.classes[index] for index in expected.argmax(-1).tolist()]
    assert engine.classify(ROWS) == names
    with pytest.raises(BundleError, match="holds no task"):
        engine.save("anywhere")


def test_another_process_serves_a_saved_task(tmp_path: Path) -> None:
    """A tuned prompt, a tuned LoRA on int8 weights, a template and a calibrated verbalizer, in one folder."""
    task = task_of_words()
    trainer = bg.compile(
        captured_fills(),
        passes=[Quantize("int8", activations="none"), SoftPrompt(2), LoRA(r=2, targets="*")],
        backend=Torch(optimizer=SGD(lr=0.5), loss=task.loss),
        verify="off",
    )
    for _ in range(2):
        trainer.step(task.batch(ROWS))
    assert isinstance(task.verbalizer, Verbalizer)
    task = task.with_verbalizer(task.verbalizer.calibrated(torch.randn(5, len(WORDS))))
    engine = bg.compile(trainer.program(), backend="onnx", resources={"task": task})
    engine.save(tmp_path / "engine")
    assert not (tmp_path / "engine" / "task_tokenizer.json").exists()
    code = (
        "import sys, bmgraph as bg\n"
        f"engine = bg.load({str(tmp_path / 'engine')!r})\n"
        f"print(engine.classify({TEXTS!r}))\n"
        "assert not [name for name in sys.modules if name.startswith(('transformers', 'bmgraph.passes', 'bmgraph.compiler'))]"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(engine.classify(TEXTS))
    engine.tokenizer = None  # as where an engine generates with another one: the task brings its own
    engine.save(tmp_path / "apart")
    assert (tmp_path / "apart" / "task_tokenizer.json").exists()
    assert bg.load(tmp_path / "apart").classify(TEXTS) == engine.classify(TEXTS)  # type: ignore[union-attr]
    loaded = bg.load(tmp_path / "engine")
    assert isinstance(loaded, Engine)
    assert torch.equal(loaded.class_probabilities(TEXTS), engine.class_probabilities(TEXTS))


def test_tasks_are_plain_data() -> None:
    tasks = [
        task_of_words(),
        Classify(
            Template('{"placeholder": "text_a"} {"mask"} {"mask"}', word_tokenizer(), SPECIAL),
            PTRVerbalizer({"a": ["w1", "w2"], "b": ["w1", "w3"]}, word_tokenizer()),
            max_length=9, truncate="balanced", padding="left", names={"input_ids": "ids", "attention_mask": None},
        ),
        Generate(Template('{"placeholder": "text_a"} is{"mask"}', byte_tokenizer(), {"eos": "<end>"}), target='{"meta": "x"}'),
    ]  # fmt: skip
    for task in tasks:
        again = task_of(task.as_json(), task.vocabulary.text)
        assert again.as_json() == task.as_json()
        assert [prompt.ids for prompt in again.prompts_of(TEXTS)] == [
            prompt.ids for prompt in task.prompts_of(TEXTS)
        ]
    assert sorted(tasks[1].batch(TEXTS)) == ["ids"]


def test_targets_follow_their_prompts() -> None:
    template = Template('{"placeholder": "text_a"} is {"mask"}', byte_tokenizer(), {"eos": "<end>"})
    rows = [{"text_a": "ab", "target": "good"}, {"text_a": "c", "target": "bad x"}]
    encode = lambda text: byte_tokenizer().encode(text).ids  # noqa: E731
    for side in ("left", "right"):
        batch = Generate(template, padding=side).batch(rows)
        for index, row in enumerate(rows):
            ids = [*encode(row["text_a"]), *encode(" is"), *encode(f" {row['target']}"), *encode("<end>")]
            kept = batch["attention_mask"][index].bool()
            assert batch["input_ids"][index][kept].tolist() == ids
            wanted = batch["targets"][index][kept]
            count = len(encode(f" {row['target']}")) + 1
            assert wanted[-count - 1 : -1].tolist() == ids[-count:]
            assert wanted.ne(-100).sum() == count
    assert sorted(Generate(template).batch(["ab", "c"])) == ["attention_mask", "input_ids"]
    with pytest.raises(InputError, match="row 1 has no text 'target'"):
        Generate(template).batch([rows[0], "c"])
    short = Generate(template, max_length=5).batch(rows[1:])
    assert short["input_ids"].shape == (1, 5)


def test_an_encoder_decoder_learns_to_write_targets() -> None:
    template = Template(
        '{"placeholder": "text_a"} {"mask"}', numbered_tokenizer(), {"eos": "</s>", "pad": "<pad>"}
    )
    task = Generate(template, model="encoder-decoder", start=0)
    batch = task.batch([{"text_a": "w0", "target": "great"}, {"text_a": "w1 w2", "target": "w3 bad"}])
    ids = numbered_tokenizer().token_to_id
    assert batch["decoder_input_ids"].tolist() == [[0, ids("great"), 0], [0, ids("w3"), ids("bad")]]
    assert batch["targets"].tolist() == [[ids("great"), 1, -100], [ids("w3"), ids("bad"), 1]]


def made(**options: Any) -> Classify:
    task = task_of_words()
    return Classify(task.template, task.verbalizer, **options)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: made(model="bidirectional"), f"choose one of {', '.join(MODELS)}"),
        (lambda: made(padding="up"), "choose one of right, left"),
        (lambda: made(truncate="middle"), "choose one of tail, head, balanced, never"),
        (lambda: made(max_length=2.5), "max_length=2.5"),
        (lambda: made(names={"input_id": "x"}), "did you mean 'input_ids'"),
        (lambda: made(model="encoder-decoder"), "needs the id that its decoder starts with"),
        (lambda: made().batch([]), "there are no rows"),
        (lambda: made().batch("text"), "give a list of texts or dicts"),
        (lambda: made().batch([3]), "row 0 is a int"),
        (lambda: made().batch([ROWS[0], "w1"]), "1 of 2 rows have a label"),
        (lambda: made().batch([{"text_a": "w1", "label": "postive"}]), "did you mean 'positive'"),
        (lambda: made().loss({}, {}), "needs the input 'label'"),
        (lambda: made(output="logit").read({"logits": torch.zeros(1, 1, 1)}), "did you mean 'logits'"),
        (lambda: made().read({"a": torch.zeros(2), "b": torch.zeros(2)}), "give output="),
        (lambda: Classify(Template('{"mask"} {"mask"}', word_tokenizer(), SPECIAL), made().verbalizer), "the template has 2 masks"),
        (lambda: Classify(made().template, {"a": "b"}), "the verbalizer is a dict"),  # type: ignore[arg-type]
        (lambda: Generate(made().template, model="encoder"), "an encoder writes no text"),
        (lambda: Generate(Template('a {"mask"}', byte_tokenizer())), "no token that ends a text"),
        (lambda: bg.compile(captured_fills(), backend="torch", resources={"task": 3}), "resource 'task' is a int"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)


def test_an_engine_gives_what_verbalizers_are_made_of() -> None:
    task, model = task_of_words(), fills()
    engine = bg.compile(model, example=task.batch(TEXTS), backend="torch", resources={"task": task})
    values = engine.at_masks(TEXTS, batch_size=3)
    assert values.shape == (4, 1, len(WORDS))
    engine.calibrate(["", "w0"])
    empty = engine.at_masks(["", "w0"])[:, 0].mean(0)
    prior = torch.log_softmax(empty[[WORDS.index(word) for word in ("great", "good", "bad")]], 0)
    row = torch.log_softmax(values[0, 0, [WORDS.index(word) for word in ("great", "good", "bad")]], 0) - prior
    row = torch.log_softmax(row, 0)
    expected = torch.stack([row[:2].mean(), row[2]]).softmax(0)
    torch.testing.assert_close(engine.class_probabilities(TEXTS)[0], expected, rtol=1e-5, atol=1e-6)
    assert isinstance(engine.task, Classify)
    assert isinstance(engine.task.verbalizer, Verbalizer)
    assert engine.task.verbalizer.without_rare(values[:, 0], 0.0).prior is None


def test_an_engine_without_a_task_says_so() -> None:
    engine = bg.compile(captured_fills(), backend="torch")
    with pytest.raises(InputError, match="this engine has no task"):
        engine.classify(TEXTS)


def test_hostile_tasks_are_refused(tmp_path: Path) -> None:
    good = task_of_words()
    text = good.vocabulary.text
    verbalizer = good.verbalizer.as_json()
    for change in (
        {"kind": "other"}, {"template": '{"mask": __import__("os")}'}, {"verbalizer": {**verbalizer, "ids": [[[-1]], [[2]]]}},
        {"verbalizer": {**verbalizer, "classes": ["a"]}}, {"special": {"mask": 3}}, {"special": {"pad": "[P]"}}, {"start": "0"}, {"names": {"input_ids": 3}}, {"template": '{"soft", "duplicate": 9999}' * 999 + '{"mask"}'}, {"verbalizer": {**verbalizer, "ids": [[[1] * 4000, *[[1]] * 4000], [[1]]], "label_words": [["a"] * 4001, ["a"]]}}, {"model": None, "names": {"x": "y"}},
    ):  # fmt: skip
        with pytest.raises((ValueError, KeyError, TypeError, InputError)):
            task_of({**good.as_json(), **change}, text)
