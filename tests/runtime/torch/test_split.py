"""One graph on several devices: two placements on the CPU give the same bits, and every call has its operands on one device."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

import bmgraph as bg
from bmgraph.backends import AdamW, Torch
from bmgraph.errors import BackendError, InputError
from bmgraph.ir.eval_form import eval_form
from bmgraph.ir.evaluation import run_call
from bmgraph.ir.program import Program, copy_graph
from bmgraph.pass_manager.report import Report
from bmgraph.passes import KVCache, Quantize
from bmgraph.runtime.torch import split
from bmgraph.runtime.torch.device_plan import Load, loads_of, parts_of, shares_of
from bmgraph.runtime.torch.engine import TorchEngine
from bmgraph.utils.torch_internals import FakeTensorMode
from tests.helpers.models import tied_decoder, tiny_decoder, tiny_encoder, tokens
from tests.helpers.zoo import BY_NAME

PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]


class Plain(torch.nn.Module):
    """Layers that differ, so that none repeats, one weight that is read twice, and items of a split."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)
        self.scale = torch.nn.Buffer(torch.rand(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x).relu()) * self.scale
        one, two = self.first(x).split(5, -1)
        return torch.cat([two, one], -1) + torch.arange(10)


@cache
def program_of(name: str) -> Program:
    match name:
        case "encoder":
            return bg.capture(tiny_encoder(layers=5), tokens())
        case "int4":
            return bg.Pipeline([Quantize("int4", group=16)]).run(program_of("encoder"), verify="off")
        case "tied":
            return bg.capture(tied_decoder(), tokens())
        case "cache":
            return bg.Pipeline([KVCache()]).run(bg.capture(tiny_decoder(layers=3), tokens()), verify="off")
    return bg.capture(Plain().eval(), (torch.randn(3, 6),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("t5", torch.float32), ("t5", torch.bfloat16), ("gemma2", torch.bfloat16), ("mixtral", torch.float32)],
)
def test_models_generate_and_score_as_on_one_device(name: str, dtype: torch.dtype) -> None:
    """Encoder and decoder are each divided; what is tied stands on every device that reads it."""
    model, example = BY_NAME[name].build().eval().to(dtype), BY_NAME[name].example(2, 8)
    one, *others = (
        bg.compile(model, example=example, backend=Torch(generate=True, devices=("cpu",) * count))
        for count in (1, 2, 3)
    )
    start = {"start": 0} if name == "t5" else {}
    asked = (
        {},
        {"num_beams": 3, "n": 2},
        {"temperature": 1.0, "seed": 1, "n": 2},
        {"logprobs": 1},
        {"repetition_penalty": 1.5},
    )
    for engine in others:
        for options in asked:
            for prompts in ([*PROMPTS, PROMPTS[0]], PROMPTS[0]):
                found, expected = (
                    made.generate(prompts, max_new_tokens=6, **options, **start) for made in (engine, one)
                )
                if "logprobs" not in options:
                    assert found == expected
                    continue
                for answer, alone in zip(
                    *(item if isinstance(item, list) else [item] for item in (found, expected))
                ):
                    assert answer.ids == alone.ids
                    rounding = (
                        1e-4 if dtype == torch.float32 else 0.05
                    )  # a step of one token on one device sums in another order
                    scores = [[item.logprob for item in given.scores] for given in (answer, alone)]
                    assert scores[0] == pytest.approx(scores[1], abs=rounding)
        for batch in (example, BY_NAME[name].example(3, 11)):
            whole = one(**batch)
            assert all(torch.equal(value, whole[key]) for key, value in engine(**batch).items())


@pytest.mark.parametrize("name", ["encoder", "int4", "tied", "plain"])
def test_placements_on_the_cpu_give_the_same_bits(name: str) -> None:
    program = program_of(name)
    expected = program(**program.example)
    for count in (1, 3):
        report = Report()
        engine = TorchEngine(program, report, devices=split.Devices(("cpu",) * count))
        found = engine(**program.example)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        (note,) = report.notes
        assert note.count("of weights") == count


def test_generates_as_on_one_device() -> None:
    program = program_of("cache")
    one = TorchEngine(program, Report())
    two = TorchEngine(program, Report(), devices=split.Devices(("cpu", "cpu")))
    for options in ({}, {"num_beams": 3}):
        assert two.generate(PROMPTS, max_new_tokens=6, **options) == one.generate(
            PROMPTS, max_new_tokens=6, **options
        )


@pytest.mark.parametrize("name", ["encoder", "int4", "tied", "cache", "plain"])
def test_each_call_has_its_operands_on_one_device(name: str) -> None:
    program = program_of(name)
    graph = copy_graph(program.graph)
    eval_form(graph, len(program.outputs))
    places = [torch.device("cpu"), torch.device("cuda", 0), torch.device("cpu")]
    parts = parts_of(program, 3)
    shares = shares_of(loads_of(program, graph, parts), [10**9] * 3)
    made, attributes = split.split_graph(program, graph, parts, shares, places)
    seen = _devices_of_calls(program, made, attributes, places)
    assert seen >= {"cpu", "cuda"}
    used = {number for _, number in attributes.values()}
    assert used == {0, 1, 2}


def _devices_of_calls(
    program: Program, graph: fx.Graph, attributes: split.Attributes, places: list[torch.device]
) -> set[str]:
    """Run a graph on tensors without data, which refuse operands on several devices; the types of devices of its products."""
    mode, found = FakeTensorMode(), set[str]()
    values: dict[fx.Node, Any] = {}

    def fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    inputs = iter([fake(program.example[spec.name], places[0]) for spec in program.inputs])
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                name, number = attributes[str(node.target)]
                values[node] = fake(program.tensor(name), places[number])
            elif node.op == "call_function":
                values[node] = run_call(node, values.__getitem__)
                of_one = {
                    item.device
                    for source in node.all_input_nodes
                    if isinstance(item := values[source], torch.Tensor) and item.dim()
                }
                assert len(of_one) < 2, node
                if node.target is not operator.getitem and isinstance(values[node], torch.Tensor):
                    found.add(values[node].device.type)
    return found


LOADS = st.lists(
    st.builds(
        Load,
        st.dictionaries(st.sampled_from("abcdefgh"), st.just(7), max_size=3),
        st.integers(0, 20),
        st.integers(0, 20),
    ),
    min_size=1,
    max_size=7,
)


@given(LOADS, st.lists(st.integers(1, 60), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_leaves_the_fullest_device_emptier(loads: list[Load], capacities: list[int]) -> None:
    def fullest(cuts: list[int]) -> float:
        worst = 0.0
        for begin, end, capacity in zip(cuts, cuts[1:], capacities):
            inside = loads[begin:end]
            names = {name for load in inside for name in load.weights}
            total = (
                7 * len(names)
                + sum(load.held for load in inside)
                + max((load.activations for load in inside), default=0)
            )
            worst = max(worst, total / capacity)
        return worst

    def all_cuts(begin: int, devices: int) -> list[list[int]]:
        if devices == 1:
            return [[begin, len(loads)]]
        return [[begin, *rest] for end in range(begin, len(loads) + 1) for rest in all_cuts(end, devices - 1)]

    best = min(map(fullest, all_cuts(0, len(capacities))))
    if best > 1:
        with pytest.raises(BackendError, match="do not fit"):
            shares_of(loads, capacities)
        return
    shares = shares_of(loads, capacities)
    assert [share.begin for share in shares] + [shares[-1].end] == [0, *(share.end for share in shares)]
    assert shares[-1].end == len(loads)
    assert max(share.total / size for share, size in zip(shares, capacities)) <= best + 1e-9


def test_refuses_what_does_not_fit_and_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("encoder")
    with pytest.raises(InputError, match="'gpu9', which is not there"):
        bg.compile(program, backend=Torch(devices=("cpu", "gpu9")), verify="off")
    with pytest.raises(InputError, match="give the names of devices"):
        Torch(devices=(0, 1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="ranks"):
        Torch(AdamW(), devices=("cpu",))  # type: ignore[call-overload]
    monkeypatch.setattr(split, "free_bytes", lambda _: 2000)
    with pytest.raises(BackendError, match=r"devices= have 0\.0 MB, 0\.0 MB free"):
        bg.compile(program, backend=Torch(devices=("cpu", "cpu")), verify="off")
