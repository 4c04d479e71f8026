"""Encoder-decoders from training to generation: labels that become decoder ids, and deltas of which each prompt has one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.ir.program import Program
from bmgraph.lowering.to_exported_program import deployed
from bmgraph.passes import Deltas, LoRA
from bmgraph.passes.kvcache.teacher_forcing import DECODER_IDS, with_decoder_ids
from tests.helpers.deltas import trained

WIDTH, HEADS, VOCABULARY, START = 8, 2, 12, 1


class Attend(nn.Module):
    """Attention of queries to keys, causal where both are the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor, causal: bool) -> torch.Tensor:
        q, k, v = (
            layer(value).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer, value in ((self.q, x), (self.k, y), (self.v, y))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        out: torch.Tensor = x + self.o(mixed.transpose(1, 2).flatten(2))
        return out


class Translator(nn.Module):
    """An encoder over ids, and a decoder whose ids are labels moved by one behind a start id, times `factor`."""

    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.embed, self.encode = nn.Embedding(VOCABULARY, WIDTH), Attend()
        self.own, self.cross, self.head = Attend(), Attend(), nn.Linear(WIDTH, VOCABULARY)
        self.factor = factor

    def decode(self, ids: torch.Tensor, decoder_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.embed(decoder_ids)
        memory = self.encode(x, x, False)
        scores: torch.Tensor = self.head(self.cross(self.own(y, y, True), memory, False))
        return scores

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        moved = labels.new_zeros(labels.shape)
        moved[:, 1:] = labels[:, :-1] * self.factor
        moved[:, 0] = START
        scores = self.decode(ids, moved.masked_fill(moved < 0, 0).clamp(max=VOCABULARY - 1))
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten())
        return {"loss": loss, "scores": scores}


def captured(factor: int = 1) -> tuple[Translator, Program]:
    torch.manual_seed(0)
    model = Translator(factor).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    labels = torch.randint(2, VOCABULARY, (3, 5))
    labels[0, 3:] = -100
    return model, bg.capture(model, {"ids": torch.randint(2, VOCABULARY, (3, 6)), "labels": labels})


def greedy(model: Translator, ids: list[list[int]], count: int) -> list[list[int]]:
    given, made = torch.tensor(ids), torch.full((len(ids), 1), START)
    with torch.no_grad():
        for _ in range(count):
            made = torch.cat([made, model.decode(given, made)[:, -1:].argmax(-1)], 1)
    return made[:, 1:].tolist()


PROMPTS = [[3, 4, 5, 6, 7], [8, 2, 9, 4, 4]]


def test_what_was_captured_with_labels_generates() -> None:
    model, program = captured()
    engine = bg.compile(program, backend=Torch(generate=True))
    assert engine.generate(PROMPTS, start=START, max_new_tokens=6) == greedy(model, PROMPTS, 6)


def test_labels_that_are_not_merely_moved_stay() -> None:
    for factor, names in ((1, {"ids", DECODER_IDS}), (2, {"ids", "labels"})):
        found = with_decoder_ids(deployed(captured(factor)[1]))
        assert {spec.name for spec in found.inputs} == names


@pytest.mark.parametrize("targets", ["*", "encode.q"])
def test_deltas_of_encoder_and_decoder_are_chosen_by_prompt(targets: str, tmp_path: Path) -> None:
    _, program = captured()
    tuned = trained(bg.Pipeline([LoRA(r=2, targets=(targets,))]).run(program), size=0.5)
    tuned.save_delta(str(tmp_path / "d"))
    options = {"start": START, "max_new_tokens": 6}
    alone = [
        bg.compile(item, backend=Torch(generate=True)).generate(PROMPTS[row : row + 1], **options)[0]
        for row, item in enumerate((tuned, program))
    ]
    engine = bg.compile(
        program, [Deltas(("d",))], backend=Torch(generate=True), resources={"d": tmp_path / "d"}
    )
    assert engine.generate(PROMPTS, delta=["d", None], **options) == alone
