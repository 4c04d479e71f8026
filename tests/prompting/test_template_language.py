"""The template language: what it reads, and what it refuses with the place."""

from __future__ import annotations

import pytest

from bmgraph.errors import InputError
from bmgraph.prompting.template_language import Node, parse


def test_every_kind_of_node_is_read() -> None:
    text = (
        '{"placeholder": "text_a", "shortenable": False} it\'s: {"meta":\'head\', "post_processing": ["strip", "lower"]}'
        '{"soft": None, "duplicate": 3, "same": True}{"soft_id": 1} {"soft": "a \\"b\\"", "soft_id": 2} {"special": "<sep>"} '
        '{"text": "{"}{"mask"} .'
    )
    assert parse(text) == (
        Node("placeholder", "text_a"),
        Node("text", "it's:", True),
        Node("meta", "head", True, post_processing=("strip", "lower")),
        Node("soft", None, duplicate=3, same=True),
        Node("soft", None, soft_id=1),
        Node("soft", 'a "b"', True, soft_id=2),
        Node("special", "<sep>", True),
        Node("text", "{", True),
        Node("mask", None),
        Node("text", ".", True),
    )


def test_placeholders_are_shortenable_unless_they_say_otherwise() -> None:
    cut = [
        node.shortenable
        for node in parse('{"placeholder": "a"} {"meta": "b"} {"meta": "c", "shortenable": true} x')
    ]
    assert cut == [True, False, True, False]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"placehodler": "text_a"}', "unknown key 'placehodler'; did you mean 'placeholder'"),
        ('a {"mask"', 'a node that no "}" ends'),
        ("a } b", 'a "}" without "{"'),
        ("{}", "a node without a key"),
        ('{"mask": 3}', "a mask has no value"),
        ('{"mask", "text": "x"}', "of one kind"),
        ('{"soft_id": 0}', "'soft_id' is a whole number of 1 or more"),
        ('{"soft_id": True}', "'soft_id' is a whole number of 1 or more"),
        ('{"text": "x", "soft_id": 1}', "for soft tokens"),
        ('{"soft": "x", "duplicate": 2}', "for soft tokens without a text"),
        ('{"soft", "duplicate": 99999999}', "10000 at most"),
        ('{"mask", "shortenable": True}', "a mask cannot be shortenable"),
        ('{"meta": "x", "post_processing": lambda s: s}', "nothing in a template is run"),
        ('{"meta": "x", "post_processing": "__import__"}', "unknown post-processing '__import__'"),
        ('{"soft": "x", "post_processing": "mlp"}', "single soft tokens is not built: leave it out"),
        ('{"meta": "x", "post_processing": "stripp"}', "did you mean 'strip'"),
        ('{"meta": __import__("os")}', "expected a string"),
        ('{"meta": ""}', "needs a text"),
        ('{"meta": "x", "meta": "y"}', "stands twice"),
        ('{"duplicate": 2}', "of one kind"),
        ("x" * 100_001, "100000 at most"),
    ],
)
def test_what_is_not_valid_is_told(text: str, told: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text)
    assert told in str(error.value)


def test_a_template_that_is_no_text_is_told() -> None:
    with pytest.raises(InputError, match="give its text"):
        parse(3)  # type: ignore[arg-type]
