"""Ranks that divide the proof of a captured program find together what one finds alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.distributed.process_group import Ranks
from bmgraph.frontend import eager_check
from bmgraph.frontend.capture import capture
from bmgraph.frontend.proof_share import WHOLE_PROOF, ProofShare, captured_by_ranks
from bmgraph.ir.program import Program
from tests.frontend.test_backward_check import Model, example
from tests.frontend.test_proof_batches import TwiceInEval

SHARES = [ProofShare(rank, 2) for rank in range(2)]


@dataclass(frozen=True)
class Two(Ranks):
    """The first of two ranks; the other's answers are given."""

    size: int = 2
    other: list[str] = field(default_factory=list)
    differs: bool = False

    def first_different(self, digests: Mapping[str, bytes]) -> tuple[int, str] | None:
        """What is given."""
        return (1, next(iter(digests))) if self.differs else None

    def gather_texts(self, text: str) -> list[str]:
        """This rank's text and the other's."""
        return [text, *self.other]

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """The other does not fail."""
        yield


def test_shares_make_a_whole_and_no_more() -> None:
    parameters = dict(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)).named_parameters())
    for size in (1, 2, 3, 9):
        shares = [ProofShare(rank, size) for rank in range(size)]
        found = [name for share in shares for name in share.parameters(parameters)]
        assert sorted(found) == sorted(parameters)
        assert all(sum(share.has(number) for share in shares) == 1 for number in range(7))


@pytest.mark.parametrize("how", ["", "reverse", "clip", "hook"])
def test_another_backward_is_found_by_a_rank(how: str) -> None:
    programs = [capture(Model(how), example(), prove="training", share=share) for share in SHARES]
    assert any(program.training for program in programs) is bool(how)
    assert all(program.training or "in 4 of 4" in program.backward for program in programs)


def test_each_comparison_is_made_by_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = [capture(TwiceInEval(), (torch.randn(3),), share=share).training for share in SHARES]
    assert "eval form differs" in "".join(forms)
    compared: list[torch.Size] = []
    known = eager_check._bounds

    def counted(
        model: nn.Module, eager: object, batch: Mapping[str, torch.Tensor], expected: object
    ) -> object:
        compared.append(next(iter(batch.values())).shape)
        return known(model, eager, batch, expected)  # type: ignore[arg-type]

    monkeypatch.setattr(eager_check, "_bounds", counted)
    runs = []
    for share in (WHOLE_PROOF, *SHARES):
        compared.clear()
        capture(nn.Linear(4, 2), (torch.randn(3, 4),), share=share)
        runs.append(sorted(map(tuple, compared)))
    assert runs[0] == sorted(runs[1] + runs[2])
    assert runs[1]
    assert runs[2]


def test_ranks_that_differ_make_the_whole_proof() -> None:
    asked: list[ProofShare] = []
    program = bg.capture(nn.Linear(4, 2), (torch.randn(3, 4),))

    def capture_once(share: ProofShare) -> Program:
        asked.append(share)
        return program

    program.unproven, program.backward = ("one",), "compared"
    captured_by_ranks(Two(other=['["compared on 3", "two", "one"]']), capture_once)
    assert asked == [SHARES[0]]
    assert program.unproven == ("one", "two")
    assert program.backward == "compared; compared on 3"
    captured_by_ranks(Two(differs=True), capture_once)
    assert asked[1:] == [SHARES[0], WHOLE_PROOF]
    captured_by_ranks(Two(), capture_once, given=True)  # one that was captured before is as it was
    assert program.unproven == ("one", "two")
