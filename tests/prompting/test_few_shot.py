"""Samples of each class, demonstrations, and measures beside precision and recall."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bmgraph.errors import InputError
from bmgraph.prompting import Demonstrations, FewShot, Measures, Template, Verbalizer
from tests.helpers.prompting import byte_tokenizer

ROWS = [{"text_a": f"r{index}", "label": "ab"[index % 2]} for index in range(10)]
WORDS = Verbalizer({"a": "good", "b": "bad"}, byte_tokenizer())
TEMPLATE = Template(
    '{"placeholder": "demonstrations"}{"placeholder": "text_a"} is {"mask"}', byte_tokenizer()
)


def test_samples_have_as_many_of_each_class_and_none_twice() -> None:
    train, valid = FewShot(per_class=2, valid=3, seed=1).sample(ROWS)
    assert [[row["label"] for row in part].count("a") for part in (train, valid)] == [2, 3]
    assert len({row["text_a"] for row in (*train, *valid)}) == 10
    assert FewShot(per_class=2, valid=3, seed=1).sample(ROWS) == (train, valid)
    assert FewShot(per_class=2, valid=3, seed=2).sample(ROWS) != (train, valid)


def test_demonstrations_are_solved_rows_of_all_classes() -> None:
    (row,) = Demonstrations(TEMPLATE, WORDS, ROWS, 4).add(["new"])
    shown = row["demonstrations"].split("\n")
    assert len(shown) == 5
    assert sorted(line.split()[-1] for line in shown[:4]) == ["bad", "bad", "good", "good"]
    for line in shown[:4]:
        index = int(line.split()[0][1:])
        assert line == f"r{index} is {'good' if index % 2 == 0 else 'bad'}"
    assert TEMPLATE.wrap(row).endswith("\nnew is <mask>")


def test_the_nearest_rows_are_shown_and_the_nearest_last() -> None:
    vectors = torch.eye(10)
    query = torch.zeros(1, 10)
    query[0, 3], query[0, 6] = 2.0, 1.0
    (row,) = Demonstrations(TEMPLATE, WORDS, ROWS, 2, vectors=vectors).add([{"text_a": "new"}], query)
    assert row["demonstrations"] == "r6 is good\nr3 is bad\n"


def test_measures_are_those_of_the_confusion_matrix() -> None:
    found, expected = list("aabbccca"), list("abbbccac")
    measures = Measures.of(found, expected)
    assert measures.accuracy == 5 / 8
    scores = []
    for name in "abc":
        pairs = list(zip(found, expected))
        true = pairs.count((name, name))
        precision, recall = true / found.count(name), true / expected.count(name)
        scores.append(2 * precision * recall / (precision + recall))
    assert list(measures.f1.values()) == pytest.approx(scores)
    assert measures.macro_f1 == pytest.approx(sum(scores) / 3)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: FewShot(0), "per_class=0"),
        (lambda: FewShot(9).sample(ROWS), "the class 'a' has 5 rows, and 9"),
        (lambda: FewShot(1).sample(["x"]), "row 0 has no label"),
        (lambda: Demonstrations(Template('a {"mask"}', byte_tokenizer()), WORDS, ROWS, 1), "no place for demonstrations"),
        (lambda: Demonstrations(TEMPLATE, WORDS, ROWS, 11), "a number from 1 to 10"),
        (lambda: Demonstrations(TEMPLATE, WORDS, ROWS, 1, vectors=torch.eye(3)), "one for each of the 10"),
        (lambda: Demonstrations(TEMPLATE, WORDS, ROWS, 1).add(["x"], torch.eye(1)), "or of neither"),
        (lambda: Measures.of(["a"], []), "1 classes were found"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call: Any, told: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert told in str(error.value)
