"""A KV cache is what the pass declares, in programs, files and engines; files of early versions are read by their names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bmgraph as bg
from bmgraph.backends import Onnx
from bmgraph.errors import BundleError, InputError
from bmgraph.ir.cache_spec import CacheLayout, SlotNames
from bmgraph.ir.program import FORWARD, Program, placeholders
from bmgraph.ir.signature import Signature
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.passes import KVCache
from bmgraph.runtime.manifest import read_description
from bmgraph.serialize.bundle import read_bundle
from bmgraph.serialize.program_json import decode, encode
from tests.helpers.models import tiny_decoder, tokens


@pytest.fixture(scope="module")
def cached() -> Program:
    return bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(), tokens()))


def named_otherwise(program: Program) -> Program:
    """The program with its cache under names that say nothing, the mask in front."""
    assert program.cache is not None
    names = {slot.past: f"box_{index}" for index, slot in enumerate(program.cache.slots)}
    renamed = program.clone()
    for name, node in placeholders(renamed.graph).items():
        node.target = names.get(name, name)
    inputs = [replace(spec, name=names.get(spec.name, spec.name)) for spec in program.inputs]
    renamed.inputs = tuple(sorted(inputs, key=lambda spec: spec.name != program.cache.mask))  # type: ignore[union-attr]
    nodes = placeholders(renamed.graph)
    first = next(node for node in renamed.graph.nodes if node.op == "call_function")
    for spec in renamed.inputs:
        first.prepend(nodes[spec.name])
    slots = tuple(replace(slot, past=names[slot.past]) for slot in program.cache.slots)
    renamed.cache = replace(program.cache, slots=slots)
    renamed.example = {names.get(name, name): value for name, value in program.example.items()}
    return renamed


def test_a_cache_is_generated_from_under_any_names(cached: Program, tmp_path: Path) -> None:
    prompts = [[5, 3, 8], [1, 2, 9, 4]]
    expected = bg.compile(cached, backend="torch").generate(prompts, max_new_tokens=4)
    other = named_otherwise(cached)
    other.save(str(tmp_path / "program"))
    loaded: Any = bg.load(tmp_path / "program")
    assert loaded.cache == other.cache
    engine = bg.compile(loaded, backend="onnx")
    engine.save(tmp_path / "engine")
    for item in (bg.compile(other, backend="torch"), engine, bg.load(tmp_path / "engine")):
        assert item.generate(prompts, max_new_tokens=4) == expected
    batch = tokens(3, 5, 1)
    found = bg.load(tmp_path / "engine")(**batch)[cached.outputs[0].name]
    assert torch.allclose(found, cached(**batch)[cached.outputs[0].name], atol=1e-5)


def test_files_of_early_versions_are_told_by_their_names(cached: Program, tmp_path: Path) -> None:
    data = encode(cached)
    assert data.pop("cache") is not None
    assert decode(data, cached.tensors(), cached.example).cache == cached.cache
    backend = Onnx(optimise=False)  # early versions appended nothing in place
    bg.compile(cached, backend=backend).save(tmp_path / "engine")
    manifest = dict(read_bundle(tmp_path / "engine").manifest)
    assert read_description(tmp_path, manifest, 0).cache == cached.cache
    del manifest["cache"]
    assert read_description(tmp_path, manifest, 0).cache == cached.cache


def test_names_alone_make_no_cache(cached: Program) -> None:
    plain = cached.clone()
    plain.cache = None
    again = decode(encode(plain), plain.tensors(), plain.example)
    assert again.cache is None
    with pytest.raises(InputError, match="missing input 'past_key_0'"):
        again(**tokens(2, 4))


WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda cache: cache.update(tokens="elsewhere"), "'elsewhere', which is not there"),
    (lambda cache: cache.update(logits=3), "3 is no name"),
    (lambda cache: cache.update(mask=cache["tokens"]), "twice"),
    (lambda cache: cache.update(scored=cache.pop("mask")), "expected one of 1 dimensions"),
    (lambda cache: cache.update(tokens=cache.pop("mask"), mask="past_key_0", slots=[]), "no slots"),
    (lambda cache: cache["slots"][0].__setitem__(2, 9), "at axis 9"),
    (lambda cache: cache["slots"][0].__setitem__(2, True), "no axis"),
    (lambda cache: cache["slots"][0].pop(), "KV cache"),
    (lambda cache: cache.pop("memories"), "memories"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_cache_that_does_not_fit_is_refused(
    cached: Program, change: Callable[[Any], object], message: str
) -> None:
    data = copy.deepcopy(encode(cached))
    change(data["cache"])
    with pytest.raises(BundleError, match=message):
        decode(data, cached.tensors(), cached.example)


def test_a_cache_of_codes_scales_and_a_fixed_size_is_described() -> None:
    """What no pass makes yet: two slots for each attention, with room for 32 positions."""
    inputs = (
        TensorSpec("text", torch.int64, ("rows", "new")),
        TensorSpec("codes", torch.int8, ("rows", 2, 32, 8)),
        TensorSpec("scales", torch.float32, ("rows", 2, 32)),
    )
    outputs = (
        TensorSpec("scores", torch.float32, ("rows", "new", 11)),
        *(replace(x, name=x.name + "_out") for x in inputs[1:]),
    )
    slots = (SlotNames("codes", "codes_out", 2), SlotNames("scales", "scales_out", 2))
    layout = CacheLayout("text", "scores", slots)
    assert layout.misfit(inputs, outputs) == ""
    spec = layout.spec(Program({}, {}, {}, {FORWARD: Signature(inputs, outputs)}))
    assert spec.limit == 32
    assert spec.others == ()
    assert {name: (value.dtype, *value.shape) for name, value in spec.empty(3).items()} == {
        "codes": (torch.int8, 3, 2, 32, 8), "scales": (torch.float32, 3, 2, 32),
    }  # fmt: skip
