"""Verbalizers: their arithmetic against sums written out word by word."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bmgraph.errors import InputError
from bmgraph.prompting.generation_verbalizer import GenerationVerbalizer, TargetText
from bmgraph.prompting.prototypical_verbalizer import PrototypicalVerbalizer, contrastive_loss
from bmgraph.prompting.ptr_verbalizer import PTRVerbalizer
from bmgraph.prompting.verbalizer import Verbalizer
from bmgraph.prompting.word_search import found_words
from tests.helpers.prompting import SPECIAL, WORDS, byte_tokenizer, word_tokenizer

QUIET: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "derandomize": True}
VOCABULARY = len(WORDS) + 3
phrases = st.lists(st.sampled_from(WORDS[5:25]), min_size=1, max_size=3).map(" ".join)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(label_words: Any, **options: Any) -> Verbalizer:
    return Verbalizer(label_words, word_tokenizer(), special=SPECIAL, **options)


def naive(
    words: dict[str, list[str]], row: list[float], prior: list[float] | None, tokens: str, how: str
) -> list[float]:
    """The scores of classes, one word after another."""

    def of_word(word: str, values: list[float]) -> float:
        each = [values[WORDS.index(token)] for token in word.split()]
        return {"first": each[0], "max": max(each), "mean": sum(each) / len(each)}[tokens]

    def probabilities(values: list[float]) -> dict[str, list[float]]:
        exps = {name: [math.exp(of_word(word, values)) for word in given] for name, given in words.items()}
        total = sum(map(sum, exps.values()))
        return {name: [value / total for value in given] for name, given in exps.items()}

    found = probabilities(row)
    if prior is not None:
        base = probabilities(prior)
        found = {name: [value / other for value, other in zip(found[name], base[name])] for name in found}
        total = sum(map(sum, found.values()))
        found = {name: [value / total for value in given] for name, given in found.items()}
    logs = {name: [math.log(value) for value in given] for name, given in found.items()}
    join = {"first": lambda given: given[0], "max": max, "mean": lambda given: sum(given) / len(given)}
    return [join[how](given) for given in logs.values()]


@settings(max_examples=25, **QUIET)
@given(
    st.lists(st.lists(phrases, min_size=1, max_size=3), min_size=2, max_size=3),
    st.sampled_from(["first", "mean", "max"]),
    st.sampled_from(["first", "mean", "max"]),
    st.booleans(),
)
def test_scores_are_naive_sums(words: list[list[str]], tokens: str, how: str, calibrated: bool) -> None:
    by_class = {f"class{index}": given for index, given in enumerate(words)}
    read = [{word.split()[0] if tokens == "first" else word for word in given} for given in words]
    if any(one == other for index, one in enumerate(read) for other in read[:index]):
        with pytest.raises(InputError, match="have the same words"):
            made(by_class, tokens=tokens, words=how)
        return
    verbalizer = made(by_class, tokens=tokens, words=how)
    values, prior = logits(0, 2, 1), logits(1, 3)
    if calibrated:
        verbalizer = verbalizer.calibrated(prior)
    found = verbalizer.scores(values)
    mean = prior.float().mean(0).tolist() if calibrated else None
    expected = [naive(by_class, row[0].tolist(), mean, tokens, how) for row in values]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    again = Verbalizer.from_json(json.loads(json.dumps(verbalizer.as_json())))
    assert torch.equal(again.scores(values), found)


def test_gradients_reach_the_words_alone() -> None:
    values = logits(0, 2, 1).requires_grad_()
    made({"a": ["w0 w1", "w2"], "b": ["w3"]}, tokens="max").scores(values).sum().backward()
    assert values.grad is not None
    assert bool(values.grad.isfinite().all())
    read = {WORDS.index(word) for word in ("w0", "w1", "w2", "w3")}
    assert set(values.grad.abs().sum((0, 1)).nonzero().flatten().tolist()) <= read


def test_rare_words_are_dropped() -> None:
    prior = torch.zeros(VOCABULARY)
    prior[[WORDS.index("w1"), WORDS.index("w4")]] = -5
    kept = made({"a": ["w0", "w1 w2"], "b": ["w3"]}).without_rare(prior, 2 / VOCABULARY + 1e-6)
    assert kept.label_words == (("w0",), ("w3",))
    with pytest.raises(InputError, match="no word of class 'b' is left"):
        made({"a": ["w0"], "b": ["w4"]}).without_rare(prior, 0.2)


def test_words_without_a_prefix() -> None:
    plain = Verbalizer({"a": "<!>good", "b": " bad"}, byte_tokenizer(), prefix="")
    spaced = Verbalizer({"a": "good", "b": "bad"}, byte_tokenizer())
    assert plain.table.ids[0][0] == tuple(byte_tokenizer().encode("good").ids)
    assert plain.table.ids[1] == spaced.table.ids[1] == ((byte_tokenizer().token_to_id("\u0120bad"),),)


@pytest.mark.parametrize("score", ["llr", "ce"])
@pytest.mark.parametrize("balance", [True, False])
def test_searched_words_have_the_best_likelihood(score: str, balance: bool) -> None:
    values, labels = logits(0, 7), torch.tensor([0, 1, 0, 0, 1, 0, 0])
    probabilities = values.softmax(-1).tolist()
    for index, found in enumerate(found_words(values, labels, 2, 2, 9, score, balance)):
        own = [row for row, label in zip(probabilities, labels.tolist()) if label == index]
        other = [row for row, label in zip(probabilities, labels.tolist()) if label != index]
        near = sorted(range(VOCABULARY), key=lambda item: -sum(math.log(row[item]) for row in own))[:9]
        weight = len(own) / len(other) if balance else 1

        def worth(item: int, own: Any = own, other: Any = other, weight: float = weight) -> float:
            inside = sum(math.log(row[item]) for row in own)
            outside = weight * sum(math.log(1 - row[item]) for row in other)
            if score == "llr":
                inside -= sum(math.log(1 - row[item]) for row in own)
                outside -= weight * sum(math.log(row[item]) for row in other)
            return inside + outside

        assert found == sorted(near, key=lambda item: -worth(item))[:2]


def test_searched_words_make_a_verbalizer() -> None:
    found = Verbalizer.searched(
        logits(0, 7), torch.tensor([0, 1, 0, 0, 1, 0, 0]), ["a", "b"], word_tokenizer(), count=2
    )
    assert [len(words) for words in found.label_words] == [2, 2]
    assert found.scores(logits(1, 3, 1)).shape == (3, 2)


def test_ptr_adds_the_logits_of_each_mask() -> None:
    words = {"a": ["w0", "w1"], "b": ["w0", "w2"], "c": ["w3", "w1"]}
    verbalizer = PTRVerbalizer(words, word_tokenizer(), special=SPECIAL)
    values = logits(0, 2, 2)
    for row, found, trained in zip(values, verbalizer.scores(values), verbalizer.trained_scores(values)):
        sums = [
            sum(float(row[mask, WORDS.index(word)]) for mask, word in enumerate(given))
            for given in words.values()
        ]
        total = math.log(sum(map(math.exp, sums)))
        assert found.tolist() == pytest.approx([value - total for value in sums])
        at = [{WORDS.index(given[mask]) for given in words.values()} for mask in range(2)]
        logs = [math.log(sum(math.exp(float(row[mask, item])) for item in at[mask])) for mask in range(2)]
        means = [
            sum(float(row[mask, WORDS.index(word)]) - logs[mask] for mask, word in enumerate(given)) / 2
            for given in words.values()
        ]
        assert trained.tolist() == pytest.approx([value - total + mean for value, mean in zip(sums, means)])
    again = PTRVerbalizer.from_json(json.loads(json.dumps(verbalizer.as_json())))
    assert torch.equal(again.scores(values), verbalizer.scores(values))


def test_prototypes_learn_to_tell_classes_by_the_loss_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12) % 3
    hidden = torch.randn(3, 6, generator=generator)[labels] + 0.1 * torch.randn(12, 6, generator=generator)
    found = PrototypicalVerbalizer.fit(hidden, labels, ["a", "b", "c"], size=4, steps=30)
    assert torch.equal(found.scores(hidden[:, None]).argmax(-1), labels)
    again = PrototypicalVerbalizer.from_json(json.loads(json.dumps(found.as_json())))
    assert torch.equal(again.scores(hidden[:, None]), found.scores(hidden[:, None]))
    vectors, prototypes = hidden[:4].double(), torch.randn(3, 6, generator=generator).double()

    def cosine(one: Any, other: Any) -> float:
        return float(one @ other / (one.norm() * other.norm()))

    pairs, rows = [], []
    for one in range(4):
        others = sum(
            math.exp(cosine(vectors[one], vectors[two])) for two in range(4) if labels[one] != labels[two]
        )
        for two in range(4):
            if labels[one] == labels[two]:
                own = math.exp(cosine(vectors[one], vectors[two]))
                pairs.append(-math.log(own / (own + others)))
    for one in range(4):
        own = math.exp(cosine(vectors[one], prototypes[labels[one]]))
        others = sum(
            math.exp(cosine(vectors[two], prototypes[labels[one]]))
            for two in range(4)
            if labels[one] != labels[two]
        )
        rows.append(-math.log(own / (own + others)))
    loss = float(contrastive_loss(vectors, labels[:4], prototypes))
    assert loss == pytest.approx(sum(pairs) / len(pairs) + sum(rows) / len(rows))


def test_texts_of_classes_are_written_and_found() -> None:
    verbalizer = GenerationVerbalizer({"no": "no, {'meta': 'why'}", "yes": "Yes."})
    row = {"meta": {"why": "it has legs"}}
    assert verbalizer.target(row, "no") == "no, it has legs"
    assert verbalizer.class_of("  yes.", row) == "yes"
    assert verbalizer.class_of("No, it has  legs", row) == "no"
    assert verbalizer.class_of("maybe", row) is None


def test_files_of_label_words(tmp_path: Path) -> None:
    text, data = tmp_path / "words.txt", tmp_path / "words.json"
    text.write_text("w0\nw1\n\nw2, w3\nw4\n")
    data.write_text(json.dumps([{"a": ["w0"], "b": ["w1"]}, {"a": ["w2", "w3"], "b": ["w4"]}]))
    found = [
        Verbalizer.from_file(path, word_tokenizer(), ["a", "b"], choice=1, special=SPECIAL)
        for path in (text, data)
    ]
    assert [item.label_words for item in found] == [(("w2", "w3"), ("w4",))] * 2
    found = [
        Verbalizer.from_file(data, word_tokenizer(), order, special=SPECIAL) for order in (None, ["b", "a"])
    ]
    assert [item.classes for item in found] == [("a", "b"), ("b", "a")]
    assert [item.label_words for item in found] == [(("w0",), ("w1",)), (("w1",), ("w0",))]
    with pytest.raises(InputError, match="has words of a, b, and classes= names a, c"):
        Verbalizer.from_file(data, word_tokenizer(), ["a", "c"], special=SPECIAL)
    with pytest.raises(InputError, match="cannot read label words"):
        Verbalizer.from_file(tmp_path / "none.txt", word_tokenizer(), ["a"], special=SPECIAL)
    with pytest.raises(InputError, match="has 2 verbalizers"):
        Verbalizer.from_file(data, word_tokenizer(), choice=2, special=SPECIAL)
    with pytest.raises(InputError, match="names no classes"):
        Verbalizer.from_file(text, word_tokenizer(), special=SPECIAL)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: made({"a": [], "b": "w1"}), "the class 'a' has no words"),
        (lambda: made({"a": "w1"}), "has 1 classes"),
        (lambda: made({"a": "hello", "b": "w1"}), "the word 'hello' of class 'a' is not in the vocabulary"),
        (lambda: made({"a": "", "b": "w1"}), "class 'a' has the word ''"),
        (lambda: made({"a": "w1 w2", "b": "w1 w3"}), "'a' and 'b' have the same words of which only the first token"),
        (lambda: made({"a": "w1", "b": "w2"}, tokens="last"), "tokens='last': choose one of first, mean, max"),
        (lambda: made({"a": "w1", "b": "w2"}, words="sum"), "words='sum': choose one of mean, first, max"),
        (lambda: made(["w1", "w2"]), "give a dict"),
        (lambda: made({"a": "w1", "b": "w2"}).scores(torch.zeros(2, 1, 6)), "the model's logits are over 6 ids"),
        (lambda: made({"a": "w1", "b": "w2"}).class_index("aa", 3), "row 3 has the label 'aa'; did you mean 'a'"),
        (lambda: PTRVerbalizer({"a": ["w1"], "b": ["w1", "w2"]}, word_tokenizer()), "1 or 2 words: give one for each mask"),
        (lambda: PTRVerbalizer({"a": ["w1", "w2"], "b": ["w1", "w2"]}, word_tokenizer()), "have the same words"),
        (lambda: found_words(torch.zeros(2, 3), torch.zeros(2), 2, 1, 3, "llr", True), "class 0 has 2 of 2 rows"),
        (lambda: TargetText('x {"mask"}'), "has a mask"),
        (lambda: PrototypicalVerbalizer.fit(torch.zeros(2, 3), torch.zeros(2), ["a", "b"]), "class 'b' has no rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)
