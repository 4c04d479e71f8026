"""Rows of data: a text, or a dict of fields; what a template reads of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bmgraph.errors import InputError
from bmgraph.utils.did_you_mean import did_you_mean

Row = str | Mapping[str, Any]
"""A text, which is the field `text_a`, or fields by name, those of `meta` nodes in `row["meta"]` or beside the others."""

TEXT, META, LABEL = "text_a", "meta", "label"
"""Fields: the one that a text is, the one that holds those of `meta` nodes, and a row's class."""


def rows_of(given: object) -> list[Row]:
    """The rows of a list; raises InputError for what is none, naming the row."""
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise InputError(f"the rows are a {type(given).__name__}: give a list of texts or dicts")
    for index, row in enumerate(given):
        if not isinstance(row, (str, Mapping)):
            raise InputError(
                f"row {index} is a {type(row).__name__}: give a text, or a dict such as {{'text_a': ...}}"
            )
    return list(given)


def some_rows(given: object) -> list[Row]:
    """As `rows_of`, of one row or more; raises InputError without rows too."""
    found = rows_of(given)
    if not found:
        raise InputError("there are no rows: give at least one")
    return found


def fields_of(row: Row) -> Mapping[str, Any]:
    """The fields of a row by name."""
    return {TEXT: row} if isinstance(row, str) else row


def without_label(row: Row) -> Row:
    """A row without its class."""
    return row if isinstance(row, str) else {name: value for name, value in row.items() if name != LABEL}


def label_of(row: Row, index: int) -> Any:
    """The label of a row; raises InputError if it has none."""
    fields = fields_of(row)
    if LABEL not in fields:
        raise InputError(f"row {index} has no label: give it as the field {LABEL!r}")
    return fields[LABEL]


def field_of(row: Row, kind: str, name: str, index: int) -> str:
    """The text of a field that a template reads; `index` is the row's number, for errors."""
    fields = fields_of(row)
    if kind == META and isinstance(fields.get(META), Mapping):
        fields = fields[META]
    if name not in fields:
        known = ", ".join(map(repr, fields))
        raise InputError(
            f"row {index} has no field {name!r}{did_you_mean(name, map(str, fields))} (it has {known or 'none'})"
        )
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise InputError(f"field {name!r} of row {index} is a {type(value).__name__}: give a text")
    return str(value)
