"""Two text classification tasks, as prompts that a language model completes with one word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import assets

IGNORED = -100
"""The label of a token that the loss ignores."""

LONGEST = 160
"""Texts are truncated to this many characters."""

TREC_WORDS = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " entity",
    "HUM": " human",
    "LOC": " location",
    "NUM": " number",
}
SMS_WORDS = {0: " ham", 1: " spam"}


@dataclass(frozen=True)
class Task:
    """`items` are (text, answer word); `prompt` is the trained model's prompt, `zero_shot` also lists the answers."""

    name: str
    prompt: str
    zero_shot: str
    items: list[tuple[str, str]]

    def ask(self, text: str) -> str:
        """The prompt for a trained model."""
        return self.prompt.format(text[:LONGEST])

    def ask_untrained(self, text: str) -> str:
        """The prompt for an untrained model, which lists the answers to choose from."""
        return self.zero_shot.format(text[:LONGEST])

    def held_out(self, count: int) -> list[tuple[str, str]]:
        """The last items, which training never sees."""
        return self.items[-count:]

    def read(self, completion: str) -> str:
        """The first of the task's answers in a completion, case ignored; empty if it has none."""
        text = completion.lower()
        matches = [
            (text.index(word.strip()), word)
            for word in {word for _, word in self.items}
            if word.strip() in text
        ]
        return min(matches)[1] if matches else ""


def task(name: str) -> Task:
    """One of the two tasks: "trec" (six kinds of question) or "sms" (spam or ham)."""
    if name == "trec":
        words = ", ".join(word.strip() for word in TREC_WORDS.values())
        items = [(text, TREC_WORDS[label]) for text, label in assets.trec()]
        ask = f"Question: {{}}\nIs the answer one of {words}? The answer is a"
        return Task(name, "Question: {}\nAnswer:", ask, items)
    if name == "sms":
        messages = [(text, SMS_WORDS[label]) for text, label in assets.sms()]
        ask = "Message: {}\nIs this message spam or ham? The message is"
        return Task(name, "Message: {}\nKind:", ask, messages)
    raise SystemExit(f"unknown task {name!r}: choose trec or sms")


def batch(tokenizer: Any, task: Task, items: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Prompts with their answers, padded on the right; only the answers have labels."""
    rows, labels = [], []
    for text, answer in items:
        prompt, word = (tokenizer(part)["input_ids"] for part in (task.ask(text), answer))
        rows.append(prompt + word)
        labels.append([IGNORED] * len(prompt) + word)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels]),
    }
