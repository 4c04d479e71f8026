"""TemplateWriter: templates whose words a sequence-to-sequence model writes (LM-BFF, Gao et al. 2021, arXiv:2012.15723)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from bmgraph.errors import InputError
from bmgraph.prompting.generate import Generate
from bmgraph.prompting.rows import META, Row, fields_of, label_of, some_rows
from bmgraph.prompting.template import Template
from bmgraph.prompting.verbalizer import Verbalizer
from bmgraph.prompting.word_table import AS_IT_IS

WORD = "word"
BRACES = {"{": '{"text": "{"}', "}": '{"text": "}"}'}


class TemplateWriter:
    """Asks a model that fills gaps what stands between the text of a labelled row and the word of its class.

    `prompts(rows)` is what an engine for generation continues, its texts make `templates`. Of these take the one by which an
    engine classifies best: `engine.task = task.with_template(template)`, `engine.measure(rows)`. The paper's joint beam
    search over all rows is not there: each row has texts of its own, and those that more rows have come first.

    field: the field of rows that is the text. tokenizer, special: the generating model's, see `Template`; start: the id that its
    decoder starts with.

    Raises InputError as `Generate` does, and for an unknown label.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = ["<unk>", "</s>", "<x_0>", "fine", "good", "bad"]
        >>> library = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        >>> library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> _ = library.add_special_tokens(["</s>", "<x_0>"])
        >>> verbalizer = Verbalizer({"yes": "good", "no": "bad"}, library)
        >>> writer = TemplateWriter(verbalizer, library, special={"eos": "</s>"})
        >>> writer.prompts([{"text_a": "fine", "label": "yes"}])
        [[3, 2, 4]]
        >>> writer.templates(["It was", "so", "It was"])
        ['{"placeholder": "text_a"} It was {"mask"}', '{"placeholder": "text_a"} so {"mask"}']
    """

    def __init__(
        self,
        verbalizer: Verbalizer,
        tokenizer: object,
        *,
        field: str = "text_a",
        start: int = 0,
        special: Mapping[str, str] | None = None,
    ) -> None:
        self._verbalizer, self._text = verbalizer, f'{{"placeholder": "{field}"}}'
        asked = Template(f'{self._text} {{"mask"}} {{"meta": "{WORD}"}}', tokenizer, special)
        self.task = Generate(asked, model="encoder-decoder", start=start)

    def prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        """The ids of labelled rows, each with the first word of its class behind the gap."""
        asked: list[Row] = []
        for index, row in enumerate(some_rows(rows)):
            number = self._verbalizer.class_index(label_of(row, index), index)
            word = self._verbalizer.label_words[number][0].removeprefix(AS_IT_IS).strip()
            asked.append({**fields_of(row), META: {WORD: word}})
        return self.task.prompts(asked)

    def templates(self, texts: Sequence[str], count: int = 10) -> list[str]:
        """The `count` templates that most of the texts make, in the order of their number, then of their first text."""
        if type(count) is not int or count < 1:
            raise InputError(f"count={count!r}: give a number of templates, 1 or more")
        found = Counter(" ".join(text.split()) for text in texts)
        return [self._template(text) for text, _ in found.most_common(count)]

    def _template(self, text: str) -> str:
        words = "".join(BRACES.get(letter, letter) for letter in text)
        return f'{self._text} {words} {{"mask"}}' if words else f'{self._text} {{"mask"}}'
