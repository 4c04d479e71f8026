"""A conversation as the text that a model was trained on, by the chat template of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bmgraph.errors import InputError
from bmgraph.runtime.generation.bounded_jinja import BoundedTemplate

TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

Message = Mapping[str, str]
"""{"role": "user", "content": "..."}; roles are mostly system, user and assistant."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template with the texts of the special tokens that it may read.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}")
        >>> template.render([{"role": "user", "content": "Hello"}])
        'user: Hello'
    """

    text: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(tokenizer: object) -> ChatTemplate | None:
        """That of a tokenizer of transformers; None if it has none (of several the default)."""
        found: Any = getattr(tokenizer, "chat_template", None)
        if isinstance(found, Mapping):
            found = found.get("default")
        if not isinstance(found, str):
            return None
        texts = {name: getattr(tokenizer, name, None) for name in TOKENS}
        return ChatTemplate(found, {name: str(text) for name, text in texts.items() if text is not None})

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, up to where the assistant begins.

        Raises InputError for messages that have no role and content or that the template refuses, and for a template that is
        not valid or spends too much (`bounded_jinja.py`).
        """
        return self._template.render(
            {**self.tokens, "messages": [checked(item) for item in messages], "add_generation_prompt": True,
             "tools": None, "documents": None}
        )  # fmt: skip

    @cached_property
    def _template(self) -> BoundedTemplate:
        try:
            return BoundedTemplate(self.text)
        except InputError as error:
            raise InputError(f"the chat template of the tokenizer: {error}") from error

    def as_json(self) -> dict[str, object]:
        """The template as JSON."""
        return {"template": self.text, "tokens": dict(self.tokens)}

    @staticmethod
    def from_json(data: object) -> ChatTemplate:
        """The inverse of `as_json`; raises ValueError for anything else. Nothing of the template runs yet."""
        if not isinstance(data, dict) or not isinstance(data.get("template"), str):
            raise ValueError("the chat template is no text")
        tokens = data.get("tokens", {})
        if not isinstance(tokens, dict) or not all(
            name in TOKENS and isinstance(text, str) for name, text in tokens.items()
        ):
            raise ValueError("the chat template's tokens are not texts by name")
        return ChatTemplate(data["template"], tokens)


def checked(message: Any) -> dict[str, str]:
    """A message with texts for its role and content. Raises InputError for another."""
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise InputError(f"{ascii(message)[:80]} is no message: give {{'role': 'user', 'content': 'a text'}}")
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in message.items()):
        raise InputError(f"a message holds texts alone, and {ascii(dict(message))[:80]} something else")
    return dict(message)
