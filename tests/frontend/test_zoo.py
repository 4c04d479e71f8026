"""Capture of every zoo architecture: values and gradients equal eager, dynamic sizes, and sites as counted by hand."""

from __future__ import annotations

import pytest
import torch

from docs.generate import PAGE, row
from tests.helpers.captured import NAMES, TOLERANCE, batches, captured, distance, eager_outputs
from tests.helpers.sweep import sweep
from tests.helpers.zoo import BY_NAME, HEADS, HIDDEN, ZOO

QUICK = (
    "bert", "albert", "modernbert", "gpt2", "llama", "phi", "bloom", "t5", "mixtral", "mamba", "vit", "wav2vec2",
)  # fmt: skip
"""One of each kind, and a shared layer, local attention, parallel attention and feed-forward, position biases; the others
are slow tests."""


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_outputs_equal_eager_at_two_sizes(name: str) -> None:
    model, program = captured(name)
    model.eval()
    for batch in batches(BY_NAME[name]):
        with torch.no_grad():
            expected = eager_outputs(model, batch, [spec.name for spec in program.outputs])
        for key, value in program(**batch).items():
            assert value.shape == expected[key].shape
            assert distance(value, expected[key]) < TOLERANCE, key


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_gradients_equal_eager(name: str) -> None:
    """The training form, dropout off: every parameter's gradient."""
    model, program = captured(name)
    assert program.training == ""
    batch = BY_NAME[name].example(2, BY_NAME[name].lengths[0])
    model.train()
    model.zero_grad()
    module = program.module(training=True)
    expected = eager_outputs(model, batch, [spec.name for spec in program.outputs])
    found = dict(zip(expected, module(*(batch[spec.name] for spec in program.inputs))))
    weights = {
        key: torch.randn(value.shape, generator=torch.Generator().manual_seed(5))
        for key, value in expected.items()
    }
    for outputs in (expected, found):
        sum((value * weights[key]).sum() for key, value in outputs.items() if value.requires_grad).backward()  # type: ignore[union-attr]
    gradients = {name: item.grad for name, item in model.named_parameters() if item.grad is not None}
    graph_gradients = {name: item.grad for name, item in module.named_parameters() if item.grad is not None}
    assert len(gradients) > 10
    assert set(graph_gradients) == set(gradients)
    scale = max(float(item.norm()) for item in gradients.values())
    for key, gradient in gradients.items():
        error = float((graph_gradients[key] - gradient).norm())
        # A key bias has no gradient except rounding error, so the tolerance is relative to the largest gradient.
        assert error < TOLERANCE * max(float(gradient.norm()), 1e-3 * scale), key


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_sizes_stay_dynamic(name: str) -> None:
    arch = BY_NAME[name]
    _, program = captured(name)
    found = {dim for spec in program.inputs for dim in spec.shape if isinstance(dim, str)}
    assert set(arch.dynamic) <= found


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_sites_are_those_counted_by_hand(name: str) -> None:
    expected = BY_NAME[name].expected
    structure = captured(name)[1].structure()
    assert len(structure.attentions) == expected.attentions
    assert len(structure.feedforwards) == expected.feedforwards
    assert len(structure.experts) == expected.experts
    assert len(structure.norms) == expected.norms
    assert len(structure.embeddings) == expected.embeddings
    assert len(structure.linears) == expected.linears
    assert len(structure.layers) == expected.layers
    assert sum(attention.cross for attention in structure.attentions) == expected.cross
    assert all(item.gated == expected.gated for item in structure.feedforwards)
    for attention in structure.attentions:
        assert (attention.heads, attention.kv_heads, attention.head_size) == (
            HEADS,
            expected.kv_heads,
            HIDDEN // HEADS,
        )
        assert None not in (attention.q, attention.k, attention.v, attention.o)


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_causality_is_read_from_the_masks(name: str) -> None:
    """Self-attention of decoders is causal; encoders and cross-attention are not."""
    arch = BY_NAME[name]
    attentions = captured(name)[1].structure().attentions
    for attention in attentions:
        decodes = arch.kind in ("decoder", "mixture of experts") or "decoder" in attention.path
        assert attention.causal == (decodes and not attention.cross), attention.path


def test_most_architectures_have_dynamic_batch_and_sequence() -> None:
    dynamic = [arch for arch in ZOO if {"batch", "sequence"} <= set(arch.dynamic)]
    assert len(ZOO) >= 25
    assert len(dynamic) >= 20


@pytest.mark.parametrize("name", sweep(NAMES, QUICK))
def test_the_docs_say_what_is_found(name: str) -> None:
    """If this fails, run `python -m docs.generate`."""
    assert row(BY_NAME[name], captured(name)[1]) in PAGE.read_text().splitlines()
