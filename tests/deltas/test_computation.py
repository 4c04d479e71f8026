"""A delta says what the model computes that it was trained on: another model with equal weights does not take it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bmgraph as bg
from bmgraph.deltas.peft_format import COMPUTATION, read_adapter
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.computation import Computation
from bmgraph.ir.program import Program
from bmgraph.passes import Deltas, LoadDelta, LoRA, Prune, Quantize
from tests.helpers.deltas import trained
from tests.helpers.models import tiny_encoder, tokens


@pytest.fixture(scope="module")
def adapter(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deltas") / "trec"
    trained(bg.Pipeline([LoRA(r=2)]).run(program), size=0.1).save_delta(str(folder))
    return folder


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(tiny_encoder(), tokens())


@pytest.fixture(scope="module")
def two_heads() -> Program:
    return bg.capture(tiny_encoder(heads=2), tokens())


@pytest.mark.parametrize("load", [LoadDelta("trec"), Deltas(("trec",))], ids=["LoadDelta", "Deltas"])
def test_a_model_with_other_heads_does_not_take_it(
    two_heads: Program, adapter: Path, load: LoadDelta | Deltas
) -> None:
    with pytest.raises(
        PassError, match=r"computes another thing with them \(.*attention\[2x16 2x16\]"
    ) as caught:
        bg.Pipeline([load]).run(two_heads, resources={"trec": adapter})
    assert "attention[4x8 4x8]" in str(caught.value)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize("change", [Quantize("int8", activations="none"), Prune()], ids=["int8", "pruned"])
def test_a_model_whose_weights_were_approximated_takes_it(
    program: Program, adapter: Path, change: Quantize | Prune
) -> None:
    changed = bg.Pipeline([change]).run(program)
    assert bg.Pipeline([LoadDelta("trec")]).run(changed, resources={"trec": adapter})(**tokens())


def test_a_difference_between_versions_is_a_warning(
    program: Program, two_heads: Program, adapter: Path
) -> None:
    other = two_heads.clone()
    other.computation = replace(other.computation, versions={"torch": "1.0"})
    with pytest.warns(UserWarning, match=r"other versions.*was not checked"):
        bg.Pipeline([LoadDelta("trec")]).run(other, resources={"trec": adapter})


def test_what_is_unknown_is_not_compared(two_heads: Program, adapter: Path, tmp_path: Path) -> None:
    """PEFT's adapters do not say it, nor do programs of early versions."""
    early = two_heads.clone()
    early.computation = Computation()
    assert bg.Pipeline([LoadDelta("trec")]).run(early, resources={"trec": adapter})
    of_early = trained(bg.Pipeline([LoRA(r=2)]).run(early), size=0.1)
    of_early.save_delta(str(tmp_path / "early"))
    assert not (tmp_path / "early" / COMPUTATION).exists()
    assert not read_adapter(tmp_path / "early").computation


def test_an_altered_file_is_refused(adapter: Path, program: Program) -> None:
    text = json.loads((adapter / COMPUTATION).read_text())
    assert Computation.from_json(text) == program.computation
    kept = (adapter / COMPUTATION).read_bytes()
    (adapter / COMPUTATION).write_text(json.dumps({**text, "lines": []}))
    with pytest.raises(BundleError, match=COMPUTATION):
        read_adapter(adapter)
    (adapter / COMPUTATION).write_bytes(kept)


def test_deltas_of_one_model_stay_equal(program: Program, adapter: Path) -> None:
    again = bg.Pipeline([LoadDelta("trec")]).run(
        bg.capture(tiny_encoder(), tokens(2, 5)), resources={"trec": adapter}
    )
    assert again.computation == program.computation
    assert torch.isfinite(again(**tokens())["logits"]).all()
