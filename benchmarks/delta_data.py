"""The models and rows of benchmarks.delta, the same for both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import assets

LABEL = "label"
TEMPLATE = '{"placeholder": "text_a"} It was {"mask"}.'
WORDS = {"0": ["terrible"], "1": ["great"]}
Batch = dict[str, torch.Tensor]


class Pooled(nn.Module):
    """An encoder, the mean of its last hidden states over what is no padding, and a new head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """i64[B, S] -> logits f[B, C]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.to(hidden.dtype)[:, :, None]
        return {"logits": self.head((hidden * kept).sum(1) / kept.sum(1))}


@dataclass(frozen=True)
class Rows:
    """Rows to train on and to test on: fields `text_a` and `label`, an index into `classes`."""

    classes: tuple[str, ...]
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def rows_of(task: str, shots: int, seed: int, tested: int) -> Rows:
    """`shots` rows of each class drawn by `seed`, and the same `tested` rows for all seeds."""
    from bmgraph.prompting import FewShot

    given = {"trec": assets.trec, "sms": assets.sms, "movies": assets.rotten_tomatoes}[task]()
    items = [(text, str(label)) for text, label in given]
    classes = tuple(sorted({label for _, label in items}))
    rows = [{"text_a": text, LABEL: classes.index(label)} for text, label in items]
    test, rest = rows[:tested], rows[tested:]
    train, _ = FewShot(shots, seed=seed).sample(rest)
    return Rows(classes, train, test)


class Encoder:
    """MiniLM with a new head, on texts as its tokenizer makes them; without dropout, so that both sides see the same numbers."""

    def __init__(self, classes: int) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = str(assets.minilm())
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder = AutoModel.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="sdpa"
        )
        torch.manual_seed(0)
        self.model: nn.Module = Pooled(encoder, encoder.config.hidden_size, classes)

    def batch(self, rows: list[dict[str, Any]]) -> Batch:
        """ids, mask i64[B, S] and label i64[B]."""
        found = self._tokenizer(
            [row["text_a"] for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        batch = {name: found[name] for name in ("input_ids", "attention_mask")}
        return {**batch, LABEL: torch.tensor([row[LABEL] for row in rows])}

    def loss(self, outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed cross-entropy, and the number of rows."""
        return cross_entropy(outputs["logits"], inputs[LABEL], reduction="sum"), torch.ones_like(
            inputs[LABEL]
        ).sum()

    def scores(self, outputs: Any, inputs: Batch, shift: int = 0) -> torch.Tensor:
        """Scores of classes f[B, C]."""
        return outputs["logits"]


class Decoder:
    """SmolLM2 on film reviews, by a template and a word a class."""

    def __init__(self, classes: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from bmgraph.prompting import Classify, Template, Verbalizer

        file = assets.smollm2()
        self.tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        self.model: nn.Module = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, dtype=torch.float32
        )
        self.model.config.use_cache = False
        self.task = Classify(
            Template(TEMPLATE, self.tokenizer), Verbalizer(WORDS, self.tokenizer), model="decoder", padding="right",
            max_length=96,
        )  # fmt: skip
        self._words = [
            self.tokenizer(f" {words[0]}", add_special_tokens=False)["input_ids"][0]
            for words in WORDS.values()
        ]

    def batch(self, rows: list[dict[str, Any]]) -> Batch:
        """ids, mask i64[B, S], label i64[B] and the positions of masks i64[B, 1]."""
        return self.task.batch(rows)

    def loss(self, outputs: Batch, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """That of the task."""
        return self.task.loss(outputs, inputs)

    def scores(self, outputs: Any, inputs: Batch, shift: int = 0) -> torch.Tensor:
        """Logits of the words at the mask f[B, C], without code of tasks; `shift`: virtual tokens in front of the outputs."""
        rows = torch.arange(len(inputs["input_ids"]))
        return outputs["logits"][rows, inputs["mask_positions"][:, 0] + shift][:, self._words]

    def by_hand(self, text: str) -> torch.Tensor:
        """Log-probabilities of the words behind one text, by transformers alone f[C]."""
        ids = self.tokenizer(f"{text} It was", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return torch.log_softmax(self.model(input_ids=ids).logits[0, -1, self._words], 0)


def source(task: str, classes: int) -> Encoder | Decoder:
    """The model of a task."""
    return Decoder(classes) if task == "movies" else Encoder(classes)
