"""A loss that reads rows of logits costs no other rows, and has the numbers and gradients that it had."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.errors import InputError
from bmgraph.passes import SoftPrompt
from bmgraph.training.joint_graph import trace_step
from bmgraph.training.precision import DTYPES, Precision
from bmgraph.verify.trace_check import check_trace

F = nn.functional
Tensors = dict[str, torch.Tensor]
WORDS, WIDTH = 30, 8


class Decoder(nn.Module):
    """A table, a layer over positions, and a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)

    def forward(self, ids: torch.Tensor) -> Tensors:
        """ids i64[B, S] -> logits f[B, S, V]."""
        return {"logits": self.head(torch.tanh(self.mix(self.table(ids).cumsum(1))))}


def batch(rows: int = 4) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, WORDS, (rows, 6), generator=generator)
    return {"ids": ids}


def _loss(scores: torch.Tensor, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    labels = given["ids"][:, 0]
    return F.cross_entropy(scores, labels, reduction="sum"), torch.ones_like(labels).sum()


def at_positions(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """As a task reads masks."""
    places = (given["ids"][:, :1] % 6)[:, :, None]
    logits = outputs["logits"]
    return _loss(logits.gather(1, places.expand(-1, -1, logits.shape[-1]))[:, 0], given)


def by_index(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    logits = outputs["logits"]
    return _loss(logits[torch.arange(logits.shape[0]), given["ids"][:, 0] % 6], given)


def last(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return _loss(outputs["logits"][:, -1], given)


def twice(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """By functions of torch, the same row read in two ways, with sizes."""
    logits = outputs["logits"]
    one = torch.select(logits, 1, 2)
    two = torch.index_select(logits, 1, torch.tensor([2, 3])).mean(1)
    return _loss(one + two * logits.size(1), given)


def masked(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A mean over the positions of some ids, whose number depends on data."""
    chosen = given["ids"] % 3 == 0
    return outputs["logits"][chosen].square().sum(), chosen.sum()


SELECTING = [at_positions, by_index, last, twice, masked]


def some_words(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns, not rows."""
    return outputs["logits"][..., :20].square().sum(), torch.ones_like(given["ids"]).sum()


def first_words(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A gather whose index is narrower than the vocabulary."""
    places = (given["ids"][:, :1] % 6)[:, :, None]
    return outputs["logits"].gather(1, places.expand(-1, -1, 20)).square().sum(), torch.ones_like(
        given["ids"]
    ).sum()


def every_position(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """More selections than pay."""
    return sum(_loss(outputs["logits"][:, place], given)[0] for place in range(6)), torch.ones_like(
        given["ids"]
    ).sum()


def everywhere(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    logits = outputs["logits"]
    return _loss(logits[:, -1] + 0 * logits.sum((1, 2))[:, None], given)


def asks_for_tensors(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(outputs["logits"], torch.Tensor):
        raise TypeError("no tensor")
    return last(outputs, given)


def without_gradient(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """What is under no_grad, or detached, has no gradient."""
    logits = outputs["logits"]
    with torch.no_grad():
        scale = logits[:, 0].square().mean()
    total, count = _loss(logits[:, -1] * scale + logits[:, 1].detach(), given)
    return total, count


@pytest.fixture(scope="module")
def program() -> bg.Program:
    return bg.capture(Decoder(bias=True), batch())


@pytest.mark.parametrize("loss", SELECTING)
def test_rows_are_selected_first(program: bg.Program, loss: Callable[..., object]) -> None:
    step = trace_step(program, loss)  # type: ignore[arg-type]
    assert "equal autograd's" in check_trace(step, program, loss)  # type: ignore[arg-type]
    shapes = [
        node.meta["val"].shape for node in step.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert not [
        shape for shape in shapes if len(shape) == 3 and shape[-1] == WORDS and shape[1] not in (1, 2)
    ]


@pytest.mark.parametrize(
    "loss", [some_words, first_words, every_position, everywhere, asks_for_tensors, without_gradient]
)
def test_other_losses_are_what_they_were(program: bg.Program, loss: Callable[..., object]) -> None:
    step = trace_step(program, loss)  # type: ignore[arg-type]
    assert "equal autograd's" in check_trace(step, program, loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_in_half_precision(dtype: str) -> None:
    program = bg.capture(Decoder(), batch())
    step = trace_step(program, at_positions, precision=Precision(DTYPES[dtype]))
    assert "equal autograd's" in check_trace(step, program, at_positions)


def test_behind_a_soft_prompt() -> None:
    """Whose positions are dropped behind the head."""
    program = bg.Pipeline([SoftPrompt(tokens=3)]).run(bg.capture(Decoder(), batch()))
    step = trace_step(program, at_positions)
    assert "equal autograd's" in check_trace(step, program, at_positions)
    shapes = [
        node.meta["val"].shape for node in step.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)
    ]
    assert not [shape for shape in shapes if len(shape) == 3 and shape[-1] == WORDS and shape[1] != 1]


def test_a_size_that_a_loss_fixes_is_refused() -> None:
    """len() of a tensor is a number of Python: the step would be right for that size alone."""

    def fixed(outputs: Tensors, given: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
        logits = outputs["logits"]
        return _loss(logits[torch.arange(len(logits)), 0], given)

    program = bg.capture(Decoder(), batch())
    with pytest.raises(
        InputError, match=r"the loss function fixes axis 0 of 'ids'.*write x\.shape\[0\] for len\(x\)"
    ):
        trace_step(program, fixed)
