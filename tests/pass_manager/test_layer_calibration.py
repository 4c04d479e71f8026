"""Calibration layer by layer: what the naive way gives, in time linear in layers, in bounded memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bmgraph as bg
from bmgraph.analysis.structure.layer_parts import cut_at_layers
from bmgraph.api import Context, LayerPart, PassError, Program, ResourceError
from bmgraph.utils.spilled_values import PREFIX, SpilledValues
from tests.helpers import two_graphs
from tests.helpers.captured import NAMES, captured
from tests.helpers.layerwise import LayerwiseInt4
from tests.helpers.models import Block, TinyEncoder, tiny_encoder, tokens
from tests.helpers.zoo import BY_NAME

Batch = Mapping[str, torch.Tensor]


class Shared(nn.Module):
    """One block that runs three times, then one of its own that runs twice with another between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.other, self.head = Block(16, 2, 32), Block(16, 2, 32), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mask = mask[:, None, None].bool()
        for block in (self.block, self.block, self.block, self.other):
            x = block(x, mask)
        result: torch.Tensor = self.head(x)
        return result


class Rotary(nn.Module):
    """Layers that read a table made of positions, their own slice of a mask, and a running sum of what went before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "norm": nn.LayerNorm(16)}) for _ in range(3)
        )  # fmt: skip
        self.head = nn.Linear(16, 30, bias=False)

    def forward(self, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        turn = torch.arange(ids.shape[1])[:, None] * torch.exp(-torch.arange(8) / 4.0)
        table, total = torch.cat((turn.cos(), turn.sin()), -1), torch.zeros_like(x)
        for layer in self.layers:
            own = keep[..., None].to(x.dtype).expand(-1, -1, 16)
            total = total + x
            y = layer["norm"](x) * table * own  # type: ignore[index]
            x = x + layer["down"](torch.relu(layer["up"](y))) + 0.1 * total  # type: ignore[index]
        result: torch.Tensor = self.head(x)
        return result


def _rotary_batch(length: int, seed: int) -> Batch:
    ids = torch.randint(30, (2, length), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids, "keep": (ids > 3).long()}


def _shared_batch(length: int, seed: int) -> Batch:
    x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "mask": torch.ones(2, length, dtype=torch.int64)}


@cache
def _programs(name: str) -> tuple[Program, Sequence[Batch]]:
    if name == "encoder":
        return bg.capture(tiny_encoder(), tokens()), [tokens(), tokens(2, 5, seed=1)]
    if name == "train form":
        return bg.capture(tiny_encoder().train(), tokens()), [tokens(), tokens(2, 5, seed=1)]
    if name == "rotary":
        return bg.capture(Rotary().eval(), _rotary_batch(6, 0)), [_rotary_batch(6, 1), _rotary_batch(4, 2)]
    if name == "shared":
        return bg.capture(Shared().eval(), _shared_batch(6, 0)), [_shared_batch(6, 1), _shared_batch(4, 2)]
    if name == "two graphs":
        return two_graphs.captured()[1], [two_graphs.batch(1), two_graphs.batch(2)]
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return bg.capture(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), {"input": x}), [{"input": x}]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_on_every_architecture(name: str) -> None:
    program, arch = captured(name)[1], BY_NAME[name]
    given = [arch.example(2, arch.lengths[0]), arch.example(3, arch.lengths[1])]
    context, other = Context({"calibration": given}), Context({"calibration": given})
    done, naive = (
        LayerwiseInt4().run(program.clone(), context),
        LayerwiseInt4(naive=True).run(program.clone(), other),
    )
    assert [edit.site for edit in context.edits] == [edit.site for edit in other.edits] != []
    for key, tensor in naive.parameters.items():
        assert torch.equal(done.parameters[key], tensor), key


CASES = ("encoder", "train form", "rotary", "shared", "two graphs", "no layers")


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_running_the_whole_model_for_each_layer_gives(name: str) -> None:
    program, batches = _programs(name)
    done, spilled, naive = (
        bg.Pipeline([item]).run(program, calibration=batches, verify="structure")
        for item in (LayerwiseInt4(), LayerwiseInt4(memory=0), LayerwiseInt4(naive=True))
    )
    assert any(key.endswith("_codes") for key in done.parameters)
    assert list(done.parameters) == list(naive.parameters)
    for key, tensor in naive.parameters.items():
        assert torch.equal(done.parameters[key], tensor), key
        assert torch.equal(spilled.parameters[key], tensor), key
    assert done.history[-1].resources == naive.history[-1].resources


def test_the_parts_are_the_layers_and_what_is_around_them() -> None:
    assert [len(layers) for layers in cut_at_layers(_programs("encoder")[0]).layers] == [0, 1, 1, 0]
    rotary = cut_at_layers(_programs("rotary")[0])
    assert [[layer.path for layer in layers] for layers in rotary.layers] == [
        [],
        ["layers.0"],
        ["layers.1"],
        ["layers.2"],
        [],
    ]
    masks = [part for node, part in rotary.part_of.items() if "expand" in node.name]
    assert masks == [0, 2, 3]  # each layer's own, where it reads it
    shared = cut_at_layers(_programs("shared")[0])
    assert sum(map(bool, shared.layers)) <= 2
    assert cut_at_layers(_programs("no layers")[0]).layers == ((),)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


@cache
def _of_layers(layers: int) -> Program:
    return bg.capture(TinyEncoder(16, 2, 32, layers).eval(), tokens())


def _count(layers: int, naive: bool) -> int:
    program = _of_layers(layers).clone()
    context = Context({"calibration": [tokens(), tokens(2, 5, seed=1)]})
    with Products() as products:
        LayerwiseInt4(naive).run(program, context)
    return products.count


def test_runs_are_linear_in_layers() -> None:
    per_layer, batches = 6, 2
    # of a layer's products all but the last are run to observe it, all to go on; and X^T X of 4 inputs a batch
    expected = {layers: batches * layers * (5 + 6 + 4) for layers in (2, 5)}
    found = {layers: _count(layers, naive=False) for layers in expected}
    assert found == expected, found
    assert _count(5, naive=True) >= batches * 5 * 5 * per_layer


def _put_twice(table: SpilledValues, value: torch.Tensor) -> None:
    table.put("x", value)
    table.put("x", value)


def test_values_come_back_with_their_strides_and_files_go(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    whole = torch.arange(24.0).reshape(2, 3, 4)
    values = {
        "plain": whole, "turned": whole.transpose(0, 2), "repeated": whole[:, :1].clone().expand(2, 3, 4), "slice": whole[:, 1],
        "flags": whole > 3, "half": whole.bfloat16(), "several": (whole, 3, [whole[0] > 2]), "number": 7, "single": torch.tensor(3),
        "none": torch.zeros(0, 2),
    }  # fmt: skip
    for limit in (0, 200, 10**6):
        with SpilledValues(limit) as table:
            for key, value in values.items():
                table.put(key, value)
            assert table.peak <= limit
            assert (len(list(tmp_path.glob(f"{PREFIX}*"))) == 1) is (limit < 10**6)
            for key, value in values.items():
                found = table.get(key)
                torch.testing.assert_close(found, value, rtol=0, atol=0)
                if key in ("plain", "turned", "repeated"):
                    assert found.stride() == value.stride(), key
                table.drop(key)
            assert table._held == 0
        assert not list(tmp_path.iterdir())
    table = SpilledValues(0)
    with pytest.raises(AssertionError, match="there already"), table:
        _put_twice(table, whole)
    assert not list(tmp_path.iterdir())
    with SpilledValues(0) as table:
        table.put("x", whole)
        next(tmp_path.glob("*/*")).write_bytes(b"1")
        with pytest.raises(ResourceError, match="was changed"):
            table.get("x")


def test_one_boundary_is_kept_and_one_layers_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in files that do not fit in memory: those of one layer are there at a time, each read once."""
    monkeypatch.setattr("bmgraph.frontend.weights_folder.memory_budget", lambda: 0)
    model = TinyEncoder(32, 4, 64, 4).eval()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    with torch.device("meta"):
        empty = TinyEncoder(32, 4, 64, 4).eval()
    program = bg.capture(empty, tokens(), weights=tmp_path)
    batches = [tokens(), tokens(2, 5, seed=1)]
    from bmgraph.serialize.stored_file import FileTensor

    alive: dict[int, weakref.ref[torch.Tensor]] = {}
    most, reads = 0, 0
    read = FileTensor.read

    def counted(source: FileTensor) -> torch.Tensor:
        nonlocal most, reads
        tensor = read(source)
        reads += 1
        alive[id(tensor)] = weakref.ref(tensor)
        most = max(most, sum(item().nbytes for item in alive.values() if item() is not None))  # type: ignore[union-attr]
        return tensor

    kept: list[int] = []
    put = SpilledValues.put

    def tracked(table: SpilledValues, key: Any, value: Any) -> None:
        put(table, key, value)
        kept.append(len(table._table))

    monkeypatch.setattr(FileTensor, "read", counted)
    monkeypatch.setattr(SpilledValues, "put", tracked)
    context = Context({"calibration": batches})
    done = LayerwiseInt4().run(program.clone(), context)
    layer = sum(tensor.nbytes for name, tensor in model.blocks[0].named_parameters())
    assert most < 1.1 * layer, (most, layer)
    assert max(kept) <= 4 * len(batches), kept  # hidden states, mask, and the two sizes of the batch
    assert reads < 1.3 * len(
        program.parameters
    )  # two batches, two runs each: every weight once, some to be rewritten
    expected = LayerwiseInt4().run(bg.capture(model, tokens()), Context({"calibration": batches}))
    for key, tensor in expected.parameters.items():
        assert torch.equal(done.parameters[key], tensor), key


def test_what_has_run_may_not_change() -> None:
    program, batches = _programs("encoder")
    program = program.clone()

    def rewrite(part: LayerPart) -> None:
        if part.layers and part.layers[0].path == "blocks.1":
            with program.edit() as editor:
                editor.assign("blocks.0.up.bias", torch.zeros(64))

    with pytest.raises(
        PassError, match=r"rewriting of blocks\.1 changes blocks\.0\.up\.bias.*earlier part has run"
    ):
        Context({"calibration": batches}).calibrate_layers(program, rewrite)


def test_what_is_not_in_a_part_cannot_be_observed() -> None:
    program, batches = _programs("encoder")
    last = list(program.graph.nodes)[-2].name

    def rewrite(part: LayerPart) -> None:
        part.observe({last if part.layers else "ids"}, lambda name, value: None)

    with pytest.raises(PassError, match=rf"'{last}' is not computed in blocks\.0"):
        Context({"calibration": batches}).calibrate_layers(program, rewrite)
    with pytest.raises(PassError, match="no node is called 'nothing'"):
        Context({"calibration": batches}).calibrate_layers(
            program, lambda part: part.observe({"nothing"}, lambda name, value: None) and None
        )


def test_batches_that_give_no_numbers_are_named() -> None:
    program, batches = _programs("shared")
    bad = [*batches, {**batches[0], "x": batches[0]["x"] / 0}]
    with pytest.raises(ResourceError, match=r"calibration batch 2 makes the input 'x' (NaN|infinite)"):
        bg.Pipeline([LayerwiseInt4()]).run(program, calibration=bad, verify="off")
    with pytest.raises(
        ResourceError, match="calibration batch 1 does not fit the program: missing input 'mask'"
    ):
        bg.Pipeline([LayerwiseInt4()]).run(
            program, calibration=[batches[0], {"x": batches[0]["x"]}], verify="off"
        )
