"""GenerationVerbalizer: classes by texts that the model writes, made of words and of fields of the row."""

from __future__ import annotations

from collections.abc import Mapping

from bmgraph.errors import InputError
from bmgraph.prompting.class_scores import checked_classes
from bmgraph.prompting.rows import Row, field_of
from bmgraph.prompting.template_language import FIELDS, Node, parse
from bmgraph.utils.did_you_mean import did_you_mean


class TargetText:
    """What the model is to write for a row, in the language of templates: words and fields. Raises InputError for other nodes."""

    def __init__(self, text: str) -> None:
        self.text, self.nodes = text, parse(text)
        if not self.nodes:
            raise InputError("the target text is empty: give words or fields")
        for node in self.nodes:
            if node.kind not in (*FIELDS, "text"):
                raise InputError(f"a target text has words and fields, and {text[:80]!r} has a {node.kind}")

    def of(self, row: Row, index: int = 0) -> str:
        """The text for a row; `index` is its number, for errors."""
        return "".join(_written(node, row, index) for node in self.nodes)


def _written(node: Node, row: Row, index: int) -> str:
    assert node.value is not None
    words = node.value if node.kind == "text" else node.processed(field_of(row, node.kind, node.value, index))
    return f" {words}" if node.space else words


class GenerationVerbalizer:
    """Each class by the text that the model is to write for it, such as `yes, since {"meta": "reason"}`.

    Raises InputError for fewer than two classes and for a text that is not valid.
    """

    def __init__(self, targets: Mapping[str, str]) -> None:
        self.classes = checked_classes(list(targets))
        self.targets = {name: TargetText(text) for name, text in targets.items()}

    def target(self, row: Row, label: str, index: int = 0) -> str:
        """What the model is to write for a row of a class."""
        if label not in self.targets:
            raise InputError(
                f"row {index} has the label {label!r}{did_you_mean(label, self.classes)}: give one of {', '.join(self.classes)}"
            )
        return self.targets[label].of(row, index)

    def class_of(self, written: str, row: Row) -> str | None:
        """The class whose text the model wrote, whatever its case and the space around it; None if it is that of none."""
        found = [name for name, text in self.targets.items() if _plain(text.of(row)) == _plain(written)]
        return found[0] if len(found) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
