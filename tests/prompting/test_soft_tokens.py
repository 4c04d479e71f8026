"""Soft tokens of templates: rendered and trained as a naive renderer and a plain torch loop do it, with P-tuning's networks, on engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import SGD, Torch
from bmgraph.deltas.soft_tokens import vectors_of
from bmgraph.errors import InputError, PassError
from bmgraph.passes import LoadDelta, SoftTokens
from bmgraph.prompting import Classify, Template, Verbalizer
from bmgraph.verify.metrics import relative_error
from tests.helpers.models import tiny_decoder, tokens
from tests.helpers.prompted_models import ROWS, captured_fills, fills
from tests.helpers.prompting import SPECIAL, WORDS, word_tokenizer

TEXT = '{"soft": "good w1"} {"placeholder": "text_a"} {"soft", "duplicate": 2, "same": True} : {"mask"} {"soft_id": 1} . {"soft_id": 1}'
SOFT = [0, 1], [2, 2], [3], [3]
"""The soft tokens of the nodes of the text, counted by hand."""


def task_of(text: str = TEXT) -> Classify:
    template = Template(text, word_tokenizer(), SPECIAL)
    return Classify(
        template,
        Verbalizer({"positive": ["great", "good"], "negative": "bad"}, template.vocabulary),
        padding="right",
    )


def rendered(text: str) -> list[int]:
    """The ids of a row by hand, soft token k as -1 - k."""
    soft = [[-1 - token for token in tokens] for tokens in SOFT]
    ids = WORDS.index
    words = [ids(word) for word in text.split()]
    return [
        ids("[CLS]"), *soft[0], *words, *soft[1], ids(":"), ids("[MASK]"), *soft[2], ids("."), *soft[3], ids("[SEP]"),
    ]  # fmt: skip


def test_a_template_renders_soft_tokens_as_ids_below_0() -> None:
    task = task_of()
    assert task.template.soft_words == (WORDS.index("good"), WORDS.index("w1"), None, None)
    batch = task.batch([row["text_a"] for row in ROWS])
    for row, ids, mask in zip(ROWS, batch["input_ids"], batch["attention_mask"]):
        assert ids[mask.bool()].tolist() == rendered(row["text_a"])


def test_training_equals_a_plain_loop_and_an_engine_serves_it(tmp_path: Path) -> None:
    task, model = task_of(), fills()
    program = bg.Pipeline([SoftTokens(task.template.soft_words, seed=3)]).run(captured_fills())
    start = vectors_of(program)
    assert start is not None
    words = model.words.weight.detach()
    assert torch.equal(start[:2], words[list(task.template.soft_words[:2])])
    trainer: Any = bg.compile(program, backend=Torch(optimizer=SGD(lr=0.5, momentum=0.0), loss=task.loss))
    batch = task.batch(ROWS)
    assert torch.equal(task.example(ROWS)["input_ids"], batch["input_ids"].clamp(min=0))
    losses = [trainer.step(batch).loss for _ in range(3)]

    soft = nn.Parameter(start.clone())
    rows = [rendered(row["text_a"]) for row in ROWS]
    longest = max(map(len, rows))
    expected = []
    for _ in range(3):
        embedded, kept = torch.zeros(len(rows), longest, 16), torch.zeros(len(rows), longest, 1)
        for index, row in enumerate(rows):
            vectors = [soft[-1 - item] if item < 0 else words[item] for item in row]
            vectors += [words[0]] * (longest - len(row))
            embedded[index], kept[index, : len(row)] = torch.stack(vectors), 1
        mean = ((embedded * kept).sum(1) / kept.sum(1))[:, None].expand_as(embedded)
        logits = model.head(torch.tanh(model.mix(torch.cat([embedded, mean], -1))))
        at = torch.stack([value[row.index(WORDS.index("[MASK]"))] for value, row in zip(logits, rows)])
        scores = task.verbalizer.scores(at[:, None])
        labels = torch.tensor([task.classes.index(row["label"]) for row in ROWS])
        loss = nn.functional.cross_entropy(scores, labels)
        (gradient,) = torch.autograd.grad(loss, soft)
        expected.append(loss.item())
        soft = nn.Parameter((soft - 0.5 * gradient).detach())
    assert losses == pytest.approx(expected, abs=1e-5)
    tuned = trainer.program()
    assert relative_error(vectors_of(tuned), soft.detach()) < 1e-5
    trainer.save_delta(str(tmp_path / "soft"))
    loaded = bg.Pipeline([LoadDelta("d")]).run(captured_fills(), resources={"d": tmp_path / "soft"})
    assert torch.equal(vectors_of(loaded), vectors_of(tuned))
    with torch.no_grad():
        scores = torch.stack(
            [
                tuned(**batch)["logits"][index, place]
                for index, place in enumerate(batch["mask_positions"][:, 0])
            ]
        )
    labels = [task.classes[int(row.argmax())] for row in task.verbalizer.scores(scores[:, None])]
    texts = [row["text_a"] for row in ROWS]
    engine: Any = bg.compile(tuned, backend="torch", resources={"task": task})
    assert engine.classify(texts) == labels
    bare: Any = bg.compile(captured_fills(), backend="torch", resources={"task": task})
    with pytest.raises(InputError, match="the template has 4 soft tokens, and the engine none"):
        bare.classify(texts)


@pytest.mark.slow
def test_an_engine_is_saved_with_its_soft_tokens(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    task = task_of()
    for encoder in ("none", "lstm"):
        program = bg.Pipeline([SoftTokens(task.template.soft_words, encoder)]).run(captured_fills())  # type: ignore[arg-type]
        engine: Any = bg.compile(program, backend="onnx", resources={"task": task})
        engine.save(str(tmp_path / encoder))
        texts = [row["text_a"] for row in ROWS]
        batch = task.batch(ROWS)
        places = batch["mask_positions"][:, 0]
        values = program(**batch)["logits"][torch.arange(4), places]
        labels = [task.classes[int(row.argmax())] for row in task.verbalizer.scores(values[:, None])]
        assert bg.load(tmp_path / encoder).classify(texts) == labels


@pytest.mark.parametrize("encoder", ["mlp", pytest.param("lstm", marks=pytest.mark.slow)])
def test_networks_make_embeddings_while_they_train(encoder: str) -> None:
    program = bg.Pipeline([SoftTokens((3, 4, None), encoder)]).run(captured_fills())  # type: ignore[arg-type]
    values = {
        name.partition("_soft_")[2]: value for name, value in program.parameters.items() if "_soft_" in name
    }
    x = values["tokens"]
    if encoder == "lstm":
        lstm = nn.LSTM(16, 16, 2, bidirectional=True)
        for layer in range(2):
            for side, end in (("forward", ""), ("backward", "_reverse")):
                for ours, theirs in (("input", "ih"), ("hidden", "hh")):
                    for kind in ("weight", "bias"):
                        given = values[f"lstm_{layer}_{side}_{ours}_{kind}"]
                        getattr(lstm, f"{kind}_{theirs}_l{layer}{end}").data = given
        x = lstm(x)[0]
    x = torch.relu(nn.functional.linear(x, values["mlp_first_weight"], values["mlp_first_bias"]))
    x = nn.functional.linear(x, values["mlp_second_weight"], values["mlp_second_bias"])
    assert relative_error(vectors_of(program), x.detach()) < 1e-5
    module = program.module(training=True)
    for name, item in module.named_parameters():
        item.requires_grad_(name not in program.frozen)
    ids = torch.tensor([[3, -1, -2, -3]])
    unread = {name: torch.zeros(1, 1, dtype=torch.int64) for name in ("label", "mask_positions")}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **unread}
    (logits,) = module(*(given[spec.name] for spec in program.inputs))
    logits.square().sum().backward()
    assert all(bool(item.grad.any()) for item in module.parameters() if item.requires_grad)


@pytest.mark.slow
def test_generation_reads_soft_tokens() -> None:
    program = bg.Pipeline([SoftTokens((3, None))]).run(bg.capture(tiny_decoder(), tokens()))
    engine: Any = bg.compile(program, backend=Torch(generate=True))
    prompt = [-1, 5, -2]
    (found,) = engine.generate([prompt], max_new_tokens=3)
    ids = list(prompt)
    for _ in range(3):
        given = torch.tensor([ids])
        ids.append(int(program(ids=given, attention_mask=torch.ones_like(given))["output"][0, -1].argmax()))
    assert list(found)[-3:] == ids[-3:]
    with pytest.raises(InputError, match="soft tokens have -1 to -2"):
        engine.generate([[-3, 5]], max_new_tokens=3)


def test_bad_input_is_refused() -> None:
    program = captured_fills()
    for words, message in (((), "words="), ((-1,), "from 0 on")):
        with pytest.raises(InputError, match=message):
            SoftTokens(words)
    with pytest.raises(PassError, match="holds the id 999"):
        bg.Pipeline([SoftTokens((999,))]).run(program)
    with pytest.raises(PassError, match="no input of ids"):
        bg.Pipeline([SoftTokens((1,))]).run(bg.capture(nn.Linear(4, 3), (torch.randn(3, 4),)))
    done = bg.Pipeline([SoftTokens((1, 2))]).run(program)
    ids = torch.tensor([[3, -3]])
    with pytest.raises(InputError, match="holds -3"):
        done(input_ids=ids, attention_mask=torch.ones_like(ids))
