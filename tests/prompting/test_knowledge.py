"""Words from knowledge bases and from the model itself, against sums written out word by word."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bmgraph.errors import InputError
from bmgraph.prompting import TemplateWriter, Verbalizer
from bmgraph.prompting.knowledge import relevances
from bmgraph.prompting.word_generation import generated_words
from tests.helpers.prompted_models import task_of_words
from tests.helpers.prompting import SPECIAL, WORDS, byte_tokenizer, numbered_tokenizer, word_tokenizer

VOCABULARY = len(WORDS) + 3
KNOWN = {"a": ["w0", "hello", "w1 w2", "w3"], "b": ["w4", "w5 w6 w7", "nothing"], "c": ["w8", "w9"]}


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def known(**options: Any) -> Verbalizer:
    return Verbalizer.knowledgeable(KNOWN, word_tokenizer(), special=SPECIAL, **options)


def test_words_that_the_tokenizer_lacks_are_dropped(tmp_path: Path) -> None:
    assert known().label_words == (("w0", "w3"), ("w4",), ("w8", "w9"))
    assert known(longest=2).label_words == (("w0", "w1 w2", "w3"), ("w4",), ("w8", "w9"))
    file = tmp_path / "words.json"
    file.write_text(json.dumps(KNOWN))
    from_file = Verbalizer.from_file(file, word_tokenizer(), longest=3, special=SPECIAL)
    assert from_file.label_words == (("w0", "w1 w2", "w3"), ("w4", "w5 w6 w7"), ("w8", "w9"))


def test_relevances_are_cosines_with_the_first_words_of_classes() -> None:
    given = torch.rand(5, 3, 2, generator=torch.Generator().manual_seed(0))
    given[:, 1, 1] = 0  # no such word
    found = relevances(given)

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    for index, word in itertools.product(range(3), range(2)):
        if (index, word) == (1, 1):
            continue
        each = [cosine(given[:, index, word], given[:, other, 0]) for other in range(3)]
        others = [value for other, value in enumerate(each) if other != index]
        assert float(found[index, word]) == pytest.approx(each[index] / (sum(others) / 2), rel=1e-5)


def test_words_closer_to_other_classes_are_dropped() -> None:
    values = torch.zeros(4, VOCABULARY)
    for word, likely in (("w0", (0, 1)), ("w1", (0, 1)), ("w2", (2, 3)), ("w3", (2, 3)), ("w4", (1, 3))):
        values[list(likely), WORDS.index(word)] = 5.0
    verbalizer = Verbalizer({"a": ["w0", "w1", "w3"], "b": ["w2"]}, word_tokenizer(), special=SPECIAL)
    assert verbalizer.without_irrelevant(values).label_words == (("w0", "w1"), ("w2",))


def test_shares_of_words_are_learned() -> None:
    """One word of each class tells the rows apart, the other says the contrary, more loudly."""
    labels = torch.arange(20) % 2
    values = torch.zeros(20, VOCABULARY)
    sign = (1 - 2 * labels).float()
    for word, size in (("w0", 1.0), ("w1", -2.0), ("w2", -1.0), ("w3", 2.0)):
        values[:, WORDS.index(word)] = size * sign
    plain = Verbalizer({"a": ["w0", "w1"], "b": ["w2", "w3"]}, word_tokenizer(), special=SPECIAL)
    assert not bool((plain.scores(values[:, None]).argmax(-1) == labels).any())
    found = plain.weighted(values, labels)
    assert torch.equal(found.scores(values[:, None]).argmax(-1), labels)
    again = Verbalizer.from_json(json.loads(json.dumps(found.as_json())))
    assert torch.equal(again.scores(values[:, None]), found.scores(values[:, None]))
    assert found.shares is not None
    words = [["w0", "w1"], ["w2", "w3"]]
    for row, scores in zip(values.double(), found.scores(values[:, None])):
        total = math.log(sum(math.exp(float(row[WORDS.index(word)])) for given in words for word in given))
        expected = [
            sum(float(share) * (float(row[WORDS.index(word)]) - total) for share, word in zip(shares, given))
            for shares, given in zip(found.shares, words)
        ]
        assert scores.tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(
        plain.weighted(values, labels, steps=0).scores(values[:, None]), plain.scores(values[:, None])
    )
    old = {
        name: value for name, value in plain.as_json().items() if name != "shares"
    }  # of an earlier version
    assert torch.equal(Verbalizer.from_json(old).scores(values[:, None]), plain.scores(values[:, None]))


def test_generated_words_are_likely_and_classify_best() -> None:
    values, labels = logits(3, 9), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    log = torch.log_softmax(values.double(), -1)
    near = [
        sorted(range(VOCABULARY), key=lambda item: -float(log[labels == index, item].mean()))[:4]
        for index in range(3)
    ]

    def worth(chosen: tuple[int, ...]) -> tuple[float, float]:
        right = sum(int(row[list(chosen)].argmax()) == label for row, label in zip(values, labels.tolist()))
        likely = sum(float(log[labels == index, item].mean()) for index, item in enumerate(chosen))
        return -right / 9, -likely

    expected = sorted((one for one in itertools.product(*near) if len(set(one)) == 3), key=worth)[:5]
    found = generated_words(values, labels, 3, 4, 5)
    assert [chosen for chosen, _ in found] == expected
    assert [share for _, share in found] == pytest.approx([-worth(one)[0] for one in expected])


def test_generated_verbalizers_have_words_of_letters() -> None:
    tokenizer = byte_tokenizer()
    size = tokenizer.get_vocab_size()
    letters = {tokenizer.token_to_id(f"\u0120{word}") for word in ("good", "bad", "is", "go", "goo", "ba")}
    labels = torch.arange(6) % 2
    values = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    found = Verbalizer.generated(values, labels, ["a", "b"], tokenizer, candidates=5, count=3)
    assert len(found) == 3
    assert all(word[0] in letters for one in found for words in one.table.ids for word in words)
    (searched,) = {
        Verbalizer.searched(values, labels, ["a", "b"], tokenizer, candidates=5, letters=True).table.ids
    }
    assert all(word[0] in letters for words in searched for word in words)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: Verbalizer.knowledgeable({"a": ["hello"], "b": ["w1"]}, word_tokenizer(), special=SPECIAL), "no word of class 'a' is in the vocabulary with at most 1 ids"),
        (lambda: known(longest=0), "longest=0"),
        (lambda: known().without_irrelevant(logits(0)), "give \\[N, V\\], of 2 rows or more"),
        (lambda: known().weighted(logits(0, 3), torch.zeros(2, dtype=torch.int64)), "there are logits of 3 rows"),
        (lambda: known().weighted(logits(0, 2), torch.tensor([0, 3])), "there are 3 classes"),
        (lambda: generated_words(logits(0, 2), torch.zeros(2), 2, 3, 1), "class 1 has no rows"),
        (lambda: generated_words(logits(0, 2), torch.zeros(2), 2, 3, 1, [4]), "1 words may be chosen, for 2 classes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        call()


def test_templates_are_written_between_a_text_and_the_word_of_its_class() -> None:
    tokenizer = numbered_tokenizer()
    words = Verbalizer({"yes": ["great", "w9"], "no": "bad"}, tokenizer, special={"unk": "<unk>"})
    writer = TemplateWriter(words, tokenizer, start=0, special={"eos": "</s>", "pad": "<pad>"})
    rows = [{"text_a": "w0 w1", "label": "yes"}, {"text_a": "w2", "label": 1}]
    gap = tokenizer.token_to_id("<x_0>")
    expected = [
        [*tokenizer.encode(row["text_a"], add_special_tokens=False).ids, gap, tokenizer.token_to_id(word), 1]
        for row, word in zip(rows, ("great", "bad"))
    ]
    assert writer.prompts(rows) == expected
    found = writer.templates(["so", " it  was ", "{x}", "it was", ""], count=4)
    assert found == [
        '{"placeholder": "text_a"} it was {"mask"}',
        '{"placeholder": "text_a"} so {"mask"}',
        '{"placeholder": "text_a"} {"text": "{"}x{"text": "}"} {"mask"}',
        '{"placeholder": "text_a"} {"mask"}',
    ]
    task = task_of_words()
    shown = [task.with_template(text).template.wrap("w0") for text in found]
    assert shown == ["w0 it was <mask>", "w0 so <mask>", "w0 {x} <mask>", "w0 <mask>"]
