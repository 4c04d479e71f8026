"""Template: turns rows of data into pieces of ids, each of which truncation may cut or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bmgraph.errors import InputError
from bmgraph.prompting.rows import Row, field_of
from bmgraph.prompting.template_language import FIELDS, MOST_SOFT, Node, parse
from bmgraph.prompting.text_files import chosen, small_text
from bmgraph.prompting.vocabulary import Vocabulary

MASK = "mask"
LARGEST_FILE = 2**20


@dataclass(frozen=True)
class Piece:
    """Ids of one node; a mask has none. Soft token k has the id -1 - k, which no vocabulary has."""

    kind: str
    ids: tuple[int, ...]
    shortenable: bool


class Template:
    """How a row of data becomes a prompt, in the language of OpenPrompt (arXiv:2111.01998).

    text: words, with nodes in braces. `{"placeholder": "text_a"}` is a field of the row, `{"meta": "head"}` one of
    `row["meta"]`, `{"mask"}` what the model predicts, `{"soft"}` a trained token, `{"special": "<sep>"}` a special token,
    `{"text": "{"}` words. Options of a node: "shortenable" (placeholders are, unless they say False), "post_processing" (names
    of `POST_PROCESSING`), "add_prefix_space"; of soft tokens "soft_id", "duplicate", "same". tokenizer: a fast tokenizer of
    transformers, or one of tokenizers with the names of its special tokens, as in `special={"mask": "[MASK]"}`.

    Each piece is tokenized by itself, with a space in front where the template has one. Special tokens that a row's text
    writes out are words.

    Raises InputError, with the place, for a template that is not valid, has no mask, or writes a special token out.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "fine": 2, "was": 3}, unk_token="[UNK]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> template = Template('{"placeholder": "text_a"} was {"mask"}', words, {"mask": "[MASK]"})
        >>> template.wrap("fine")
        'fine was <mask>'
    """

    def __init__(self, text: str, tokenizer: object, special: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.vocabulary = Vocabulary.of(tokenizer, special)
        self.nodes = parse(text)
        self.masks = sum(node.kind == MASK for node in self.nodes)
        if not self.masks:
            raise InputError(
                f'the template {text[:80]!r} has no mask: write {{"mask"}} where the model predicts'
            )
        for node in self.nodes:
            self._check_words(node)
        self._soft, self.soft_words = _soft_tokens(self.nodes, self.vocabulary)
        self._specials = {
            node.value: self.vocabulary.special_named(node.value)
            for node in self.nodes
            if node.kind == "special" and node.value
        }

    @classmethod
    def from_file(
        cls, path: str | Path, tokenizer: object, choice: int = 0, special: Mapping[str, str] | None = None
    ) -> Template:
        """The template in line `choice` of a text file, empty lines not counted.

        Raises InputError for a file that cannot be read or has no such line.
        """
        lines = small_text(path, LARGEST_FILE, "templates").split("\n")
        found = [line.rstrip("\r") for line in lines if line.strip()]
        return cls(chosen(found, choice, path, "templates"), tokenizer, special)

    @property
    def soft_tokens(self) -> int:
        """The number of different soft tokens."""
        return len(self.soft_words)

    def wrap(self, row: Row, mask: str = "<mask>") -> str:
        """The prompt of a row as text, with `mask` in the place of masks and `<soft>` of soft tokens, to be read by people."""
        return "".join(self._shown(node, row, mask) for node in self.nodes)

    def pieces(self, row: Row, index: int = 0) -> list[Piece]:
        """The pieces of a row, one for each node; `index` is its number, for errors."""
        return [self._piece(node, place, row, index) for place, node in enumerate(self.nodes)]

    def _piece(self, node: Node, place: int, row: Row, index: int) -> Piece:
        if node.kind == MASK:
            ids: tuple[int, ...] = ()
        elif node.kind == "soft":
            ids = tuple(-1 - token for token in self._soft[place])
        elif node.kind == "special":
            ids = (self._specials[str(node.value)],)
        else:
            ids = self.vocabulary.ids(self._words(node, row, index))
        return Piece(node.kind, ids, node.shortenable)

    def _words(self, node: Node, row: Row, index: int = 0) -> str:
        assert node.value is not None
        words = node.value
        if node.kind in FIELDS:
            words = node.processed(field_of(row, node.kind, node.value, index))
        return f" {words}" if node.space and words else words

    def _shown(self, node: Node, row: Row, mask: str) -> str:
        if node.kind in (*FIELDS, "text"):
            return self._words(node, row)
        space = " " if node.space else ""
        if node.kind == "special":
            return f"{space}{node.value}"
        if node.kind == MASK:
            return f"{space}{mask}"
        return f"{space}<soft:{node.value}>" if node.value else f"{space}<soft>"

    def _check_words(self, node: Node) -> None:
        token = self.vocabulary.special_in(node.value) if node.kind == "text" and node.value else None
        if token is not None:
            how = '{"mask"}' if token == self.vocabulary.special.get(MASK) else f'{{"special": "{token}"}}'
            raise InputError(f"the template writes the special token {token!r} as words: write {how}")

    def __repr__(self) -> str:
        return f"Template({self.text!r})"


def _soft_tokens(
    nodes: tuple[Node, ...], vocabulary: Vocabulary
) -> tuple[dict[int, tuple[int, ...]], tuple[int | None, ...]]:
    """The soft tokens of each soft node, by its place, and for each token the id that it starts as, None for a random one."""
    found: dict[int, tuple[int, ...]] = {}
    named: dict[int, tuple[int, ...]] = {}
    words: list[int | None] = []
    for place, node in enumerate(nodes):
        if node.kind != "soft":
            continue
        if node.soft_id is not None and node.soft_id in named:
            found[place] = named[node.soft_id]
            continue
        if node.value is None:
            new: list[int | None] = [None] * (1 if node.same else node.duplicate)
        else:
            new = list(vocabulary.ids(f" {node.value}" if node.space else node.value))
        tokens = tuple(range(len(words), len(words) + len(new)))
        words += new
        found[place] = tokens * node.duplicate if node.same else tokens
        if sum(map(len, found.values())) > MOST_SOFT:
            raise InputError(f"the template has more than {MOST_SOFT} soft tokens")
        if node.soft_id is not None:
            named[node.soft_id] = tokens if not node.same else found[place]
    return found, tuple(words)
