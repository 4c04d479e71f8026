"""A selection of ordered pairs of passes on one toy architecture; `python -m docs.compatibility` tries all on four."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from docs.compatibility import EARLIER, page, read_page
from tests.helpers.pairs import (
    ARCHITECTURES,
    CHOOSING,
    EXCLUDED,
    HALF_PRECISION,
    MENDED,
    MISSING,
    RUNS,
    UNFIT,
    WRONG,
    Outcome,
    attempt,
    pairs,
    recipes,
    untried,
)
from tests.helpers.sweep import sweep
from tests.helpers.training import LANGUAGE

pytest.importorskip("onnxruntime")

ARCHITECTURE = "gpt2"

EXPECTED: dict[tuple[str, str], str] = {
    ("LoRA", "Quantize static"): RUNS,
    ("LoRA", "Quantize weights"): RUNS,
    ("LoRA", "Merge"): RUNS,
    ("LoRA", "Prune"): RUNS,
    ("LoRA", "MoEfy"): RUNS,
    ("LoRA", "KVCache"): RUNS,
    ("LoRA", "ZeRO"): RUNS,
    ("Quantize weights", "LoRA"): RUNS,
    ("Quantize weights", "MoEfy"): RUNS,
    ("Quantize weights", "ZeRO"): RUNS,
    ("Quantize static", "KVCache"): RUNS,
    ("MoEfy", "Quantize dynamic"): RUNS,
    ("Prune", "Quantize dynamic"): RUNS,
    ("Prune", "LoRA"): RUNS,
    ("Shrink", "LoRA"): RUNS,
    ("Deltas", "KVCache"): RUNS,
    ("LoadDelta", "MoEfy"): RUNS,
    ("SoftPrompt", "KVCache"): RUNS,
    ("KVCache", "Quantize weights"): MENDED,
    ("MoEfy", "LoadDelta"): MENDED,
    ("Merge", "LoRA"): RUNS,
    ("ZeRO", "LoRA"): MENDED,
    ("ZeRO", "Prune"): MENDED,
    ("Merge", "Prune"): RUNS,
    ("Merge", "MoEfy"): RUNS,
    ("Merge", "Deltas"): MENDED,
    ("Merge", "KVCache"): RUNS,
    ("Merge", "ZeRO"): EXCLUDED,
    ("Merge", "Quantize static"): RUNS,
    ("Merge", "Quantize weights"): RUNS,
    ("Prune", "Merge"): MISSING,
    ("MoEfy", "Merge"): MISSING,
    ("Quantize dynamic", "Merge"): MISSING,
    ("KVCache", "ZeRO"): MENDED,
    ("ZeRO", "KVCache"): MENDED,
    ("Remat", "ZeRO"): RUNS,
    ("Remat", "Offload"): RUNS,
    ("ZeRO", "ParallelHead"): RUNS,
    ("Remat", "ParallelHead"): MISSING,
    ("Adapter", "Merge"): MISSING,
    ("Merge", "Adapter"): RUNS,
    ("DoRA", "LoRA"): EXCLUDED,
    ("BitFit", "Distill"): RUNS,
    ("IA3", "LoadDelta"): RUNS,
    ("IA3", "MoEfy"): MENDED,
    ("QAT", "LoRA"): RUNS,
    ("LoRA", "QAT"): RUNS,
    ("Prune", "QAT"): RUNS,
    ("QAT", "Quantize static"): RUNS,
    ("QAT", "KVCache"): RUNS,
    ("QAT", "ZeRO"): RUNS,
    ("Quantize static", "QAT"): MENDED,
    ("StoreCodes", "QAT"): MENDED,
    ("StoreCodes", "LoRA"): RUNS,
    ("Quantize int4", "LoRA"): RUNS,
    ("Quantize int3", "LoRA"): RUNS,
    ("Quantize mixed", "Merge"): MISSING,
    ("Prune sparsegpt", "LoRA"): RUNS,
    ("Shrink hidden", "LoRA"): RUNS,
    ("Shrink layers", "Quantize int4"): RUNS,
    ("Quantize int4", "Stream"): RUNS,
    ("Stream", "LoRA"): RUNS,
}
"""(first, second) -> the kind of outcome."""

QUICK = {
    ("LoRA", "Quantize static"), ("LoRA", "Merge"), ("LoRA", "ZeRO"), ("Quantize weights", "LoRA"),
    ("Quantize weights", "MoEfy"), ("Prune", "LoRA"), ("Shrink", "LoRA"), ("SoftPrompt", "KVCache"),
    ("KVCache", "Quantize weights"), ("ZeRO", "LoRA"), ("ZeRO", "KVCache"),
}  # fmt: skip
"""Every pass once, lowered to an engine or a trainer; pairs that are refused at once cost nothing and are quick too."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.mark.parametrize(
    ("names", "kind"),
    sweep(EXPECTED.items(), [item for item in EXPECTED.items() if item[0] in QUICK or item[1] == MISSING]),
    ids=lambda value: " then ".join(value) if isinstance(value, tuple) else "",
)
def test_a_pair(names: tuple[str, str], kind: str, folder: Path) -> None:
    by_names = {(first.name, second.name): (first, second) for first, second in pairs()}
    outcome = attempt(by_names[names], ARCHITECTURE, folder)
    assert outcome.kind == kind, outcome.text
    if kind == MENDED:
        assert "try this order: passes=[" in outcome.text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_three_passes_run_or_are_refused_in_a_way_that_helps(seed: int, folder: Path) -> None:
    draw = Random(seed)
    tried = draw.sample(recipes(), 3)
    outcome = attempt(tried, draw.choice(ARCHITECTURES), folder)
    assert outcome.kind != WRONG, f"{[recipe.name for recipe in tried]}: {outcome.text}"


@pytest.mark.slow
def test_a_pass_that_does_not_apply_behind_what_it_requires(folder: Path) -> None:
    """An encoder has no language head to split."""
    by_name = {recipe.name: recipe for recipe in recipes()}
    outcome = attempt([by_name["ZeRO"], by_name["ParallelHead"]], "bert", folder)
    assert outcome.kind == UNFIT
    assert "does not apply" in outcome.text


@pytest.mark.slow
def test_thirty_pairs_and_more_are_tried_and_every_pair_has_a_cell() -> None:
    assert len(EXPECTED) >= 30
    assert ARCHITECTURE in LANGUAGE
    first, second = pairs()[0]
    found = {f"llama | {first.name} | {second.name}": {**Outcome(MENDED, "a | b").as_json(), "code": ""}}
    text = page(found)
    assert f"| {first.name} | {second.name} | other order | llama | a \\| b |" in text
    again = read_page(text)
    assert again == {key: {**item, "code": EARLIER} for key, item in found.items()}
    assert text.count("| ? |") > 3 * len(pairs()) / 2


def test_two_settings_of_one_pass_are_no_pair() -> None:
    assert all(first.item.name != second.item.name for first, second in pairs())


def test_every_pass_is_tried() -> None:
    assert set(untried()) == HALF_PRECISION | CHOOSING
