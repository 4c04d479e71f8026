"""Tiny models for prompts: one that fills masks and one that continues; plain torch, with names of inputs as tasks make them."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

import bmgraph as bg
from bmgraph.ir.program import Program
from bmgraph.prompting import Classify, Template, Verbalizer
from tests.helpers.prompting import SPECIAL, WORDS, word_tokenizer

ROWS = [
    {"text_a": "w0 w1 w2", "label": "positive"},
    {"text_a": "w3", "label": "negative"},
    {"text_a": "w4 w5 w6 w7 w8", "label": "negative"},
    {"text_a": "w9 w0", "label": "positive"},
]


class Fills(nn.Module):
    """Scores of words at each position, from its word and the mean of all that is no padding."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.words, self.mix, self.head = (
            nn.Embedding(len(WORDS), 16),
            nn.Linear(32, 16),
            nn.Linear(16, len(WORDS)),
        )

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object
    ) -> dict[str, torch.Tensor]:
        """i64[B, S] -> logits f[B, S, V]."""
        assert not options, "the model gets no input of the loss"
        words = self.words(input_ids)
        kept = attention_mask.to(words.dtype)[:, :, None]
        if self.causal:
            mean = (words * kept).cumsum(1) / kept.cumsum(1).clamp(min=1)
        else:
            mean = ((words * kept).sum(1) / kept.sum(1))[:, None].expand_as(words)
        return {"logits": self.head(torch.tanh(self.mix(torch.cat([words, mean], -1))))}


def fills(causal: bool = False) -> Fills:
    """The model, with the same weights at each call."""
    torch.manual_seed(0)
    return Fills(causal)


@cache
def task_of_words(padding: str = "right") -> Classify:
    """Classification of `ROWS` by a word at the mask."""
    template = Template('{"placeholder": "text_a"} : {"mask"} .', word_tokenizer(), SPECIAL)
    words = Verbalizer({"positive": ["great", "good"], "negative": "bad"}, template.vocabulary)
    return Classify(template, words, padding=padding)


@cache
def captured_fills() -> Program:
    """The model, captured once per process for training with `task_of_words`."""
    task = task_of_words()
    return bg.capture(fills(), task.batch(ROWS), prove="training", unread=task.loss.inputs)
