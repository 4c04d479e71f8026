"""Few labelled rows: samples of each class, and demonstrations in front of a prompt, at random or by similarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from bmgraph.errors import InputError
from bmgraph.prompting.rows import Row, fields_of, label_of, rows_of
from bmgraph.prompting.template import Template
from bmgraph.prompting.verbalizer import Verbalizer
from bmgraph.prompting.word_table import AS_IT_IS

DEMONSTRATIONS = "demonstrations"


@dataclass(frozen=True)
class FewShot:
    """Draws `per_class` rows of each class, and as many others for validation with `valid`, always the same for a `seed`.

    Raises InputError for numbers that are not valid.

    Example:
        >>> rows = [{"text_a": str(index), "label": index % 2} for index in range(6)]
        >>> train, valid = FewShot(per_class=1, valid=1).sample(rows)
        >>> sorted(row["label"] for row in train), sorted(row["label"] for row in valid)
        ([0, 1], [0, 1])
    """

    per_class: int
    valid: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.per_class) is not int or self.per_class < 1:
            raise InputError(f"per_class={self.per_class!r}: give a number of rows, 1 or more")
        if type(self.valid) is not int or self.valid < 0:
            raise InputError(f"valid={self.valid!r}: give a number of rows, 0 or more")

    def sample(self, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Rows to train on and rows to validate on, none in both, in an order that mixes the classes.

        Raises InputError for a row without a label, and a class with too few rows.
        """
        by_class: dict[Any, list[Row]] = {}
        for index, row in enumerate(rows_of(rows)):
            by_class.setdefault(label_of(row, index), []).append(row)
        random, wanted = Random(self.seed), self.per_class + self.valid
        train: list[Row] = []
        valid: list[Row] = []
        for label in sorted(by_class, key=str):
            given = by_class[label]
            if len(given) < wanted:
                raise InputError(
                    f"the class {label!r} has {len(given)} rows, and {wanted} are to be drawn: give more, or draw fewer"
                )
            drawn = random.sample(given, wanted)
            train += drawn[: self.per_class]
            valid += drawn[self.per_class :]
        random.shuffle(train)
        random.shuffle(valid)
        return train, valid


class Demonstrations:
    """Puts solved rows in front of others, as the field `demonstrations`, which a template reads by `{"placeholder": "demonstrations"}`.

    Each is the template's text of a labelled row without that field, with the first word of its class at the mask (in-context
    learning, Brown et al. 2020, arXiv:2005.14165). `count` of them for each row: drawn with `seed`, as many of each class as the
    count allows; or, with vectors f[N, d] of the labelled rows, those nearest to the row by cosine, the nearest last (Liu et al. 2022,
    arXiv:2101.06804).

    Raises InputError for a template without that field or with several masks, and for rows without a label.
    """

    def __init__(
        self,
        template: Template,
        verbalizer: Verbalizer,
        rows: Sequence[Row],
        count: int,
        *,
        vectors: torch.Tensor | None = None,
        separator: str = "\n",
        seed: int = 0,
    ) -> None:
        if not any(node.kind == "placeholder" and node.value == DEMONSTRATIONS for node in template.nodes):
            raise InputError(
                f'the template has no place for demonstrations: begin it with {{"placeholder": "{DEMONSTRATIONS}"}}'
            )
        if template.masks != 1:
            raise InputError(f"the template has {template.masks} masks: demonstrations are of one")
        given = rows_of(rows)
        if type(count) is not int or not 1 <= count <= len(given):
            raise InputError(f"count={count!r}: give a number from 1 to {len(given)}, the labelled rows")
        if vectors is not None and (vectors.dim() != 2 or len(vectors) != len(given)):
            raise InputError(
                f"vectors have shape {list(vectors.shape)}: give one for each of the {len(given)} labelled rows"
            )
        self._labels = [
            verbalizer.class_index(label_of(row, index), index) for index, row in enumerate(given)
        ]
        words = [verbalizer.label_words[label][0].removeprefix(AS_IT_IS) for label in self._labels]
        self._texts = [
            template.wrap({**fields_of(row), DEMONSTRATIONS: ""}, word).strip()
            for row, word in zip(given, words)
        ]
        self._count, self._separator, self._random = count, separator, Random(seed)
        self._vectors = None if vectors is None else torch.nn.functional.normalize(vectors.float(), dim=-1)

    def add(self, rows: Sequence[Row], vectors: torch.Tensor | None = None) -> list[Row]:
        """The rows with demonstrations; `vectors` f[M, d] are theirs, where those of labelled rows were given."""
        given = rows_of(rows)
        if (vectors is None) != (self._vectors is None) or (
            vectors is not None and len(vectors) != len(given)
        ):
            raise InputError(
                "give vectors of the labelled rows and of these rows, one for each, or of neither"
            )
        found: list[Row] = []
        for index, row in enumerate(given):
            chosen = self._drawn() if vectors is None else self._nearest(vectors[index])
            shown = self._separator.join(self._texts[place] for place in chosen)
            found.append({**fields_of(row), DEMONSTRATIONS: f"{shown}{self._separator}"})
        return found

    def _nearest(self, vector: torch.Tensor) -> list[int]:
        assert self._vectors is not None
        similar = self._vectors @ torch.nn.functional.normalize(vector.float(), dim=-1)
        found: list[int] = (
            torch.argsort(similar, descending=True, stable=True)[: self._count].flip(0).tolist()
        )
        return found

    def _drawn(self) -> list[int]:
        """Rows that use up the classes evenly, in a random order."""
        order = self._random.sample(range(len(self._labels)), len(self._labels))
        seen: Counter[int] = Counter()
        rounds: list[int] = []  # how many of its class stand before each
        for place in order:
            rounds.append(seen[self._labels[place]])
            seen[self._labels[place]] += 1
        by_round = sorted(zip(rounds, order), key=lambda item: item[0])  # stable
        chosen = [place for _, place in by_round[: self._count]]
        self._random.shuffle(chosen)
        return chosen
