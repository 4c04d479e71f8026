"""Laws of schedules of streamed weights, on any uses, and generation within a limit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bmgraph as bg
from bmgraph.backends import Torch
from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.passes import Quantize, Stream
from bmgraph.runtime.torch.stream.place import DevicePlace, HostPlace, Place
from bmgraph.runtime.torch.stream.reader import Reader
from bmgraph.runtime.torch.stream.schedule import Schedule, Unit, Use, plan, smallest
from bmgraph.runtime.torch.stream.weight_memory import WeightMemory
from bmgraph.utils.stored_tensor import Source
from tests.helpers.models import tiny_decoder, tokens


@st.composite
def all_uses(draw: st.DrawFn) -> list[Use]:
    sizes = draw(st.lists(st.integers(1, 40_000), min_size=1, max_size=8))
    units = [Unit(f"w{number}", 0, size, size) for number, size in enumerate(sizes)]
    begins = draw(
        st.lists(
            st.tuples(st.integers(0, 12), st.integers(0, 3), st.sampled_from(units)), min_size=1, max_size=14
        )
    )
    return list({Use(unit, begin, begin + length) for begin, length, unit in begins})


class Counted(Source):
    """Bytes that all are the number of the tensor; the most that are in memory at a time are checked by the test."""

    def __init__(self, size: int, value: int) -> None:
        self.shape, self.dtype, self.resident, self.value = (size,), torch.uint8, False, value

    def blocks(self, into: Any = None, size: int = 0) -> Any:
        raise NotImplementedError

    def sample(self, begin: int, end: int) -> bytes:
        raise NotImplementedError

    def fill(self, into: memoryview, begin: int, pages: memoryview | None = None) -> None:
        into[:] = bytes([self.value]) * len(into)

    digest, finite = "", None  # type: ignore[assignment]


@settings(max_examples=80, deadline=None)
@given(all_uses(), st.integers(0, 300_000), st.booleans())
def test_any_schedule_runs_and_keeps_its_limit(uses: list[Use], more: int, copied: bool) -> None:
    """`copied`: to a device, whose memory cannot be given back in parts."""
    place: Place = DevicePlace(torch.device("cpu")) if copied else HostPlace()
    least = smallest(uses, 100, 1000)
    assert plan(uses, least - 4096, 100, 1000, gives_back=place.gives_back) is None
    schedule = plan(uses, least + more, 100, 1000, gives_back=place.gives_back)
    assert isinstance(schedule, Schedule)
    assert schedule.peak <= schedule.limit
    memory = WeightMemory(schedule.limit, place)
    sources: dict[str, Source] = {
        use.unit.name: Counted(use.unit.bytes, int(use.unit.name[1:])) for use in uses
    }
    for _ in range(2):
        with Reader(schedule, memory, sources) as reader:
            alive: list[Use] = []
            for step in range(18):
                for use in schedule.reads:
                    if use.begin == step:
                        assert bool((reader.take(use) == int(use.unit.name[1:])).all())
                        alive.append(use)
                for use in [item for item in alive if item.end == step]:
                    reader.drop(use)
                    alive.remove(use)
                assert memory.mapped <= schedule.staying + schedule.capacity
        assert memory.mapped <= schedule.staying + schedule.capacity
    assert not [item for item in threading.enumerate() if item.name == "bmgraph-stream"]


def test_room_in_parts_that_are_too_small_is_used_too() -> None:
    sizes = {"a": 1, "b": 1, "c": 1, "d": 2}
    units = {name: Unit(name, 0, 1, 4096 * size) for name, size in sizes.items()}
    uses = tuple(Use(unit, 0, 1) for unit in units.values())
    memory = WeightMemory(3 * 4096)
    memory.begin(Schedule(3 * 4096, 0, 0, frozenset(), uses, 3 * 4096))
    a, b, c = (memory.take(units[name], False) for name in "abc")
    assert a is not None
    assert b is not None
    assert c is not None
    assert memory.take(units["d"], True) is None
    b[:] = 7
    memory.give_back(a)
    memory.give_back(c)
    assert memory.take(units["d"], False) is None
    apart = memory.take(units["d"], True)
    assert apart is not None
    assert memory.mapped == 3 * 4096
    apart[:] = 9
    assert bool((b == 7).all())
    memory.give_back(b)
    memory.give_back(apart)
    whole = memory.take(Unit("e", 0, 1, 3 * 4096), False)
    assert whole is not None
    assert len(whole) == 3 * 4096


@pytest.fixture(scope="module")
def program() -> Program:
    return bg.capture(tiny_decoder(width=128, hidden=256, vocabulary=600), tokens(), prove=False)


@pytest.mark.parametrize("passes", [(), (Quantize("int4", group=16),)])
def test_generation_within_a_limit(program: Program, passes: tuple[Quantize, ...]) -> None:
    prompts, limit = ([3, 14, 15, 9], [35], [8, 9, 7]), 19_000_000
    plain = bg.compile(program, [*passes], backend=Torch(generate=True), verify="off")
    engine = bg.compile(program, [*passes, Stream(limit)], backend=Torch(generate=True), verify="off")
    assert engine.generate(prompts, max_new_tokens=12) == plain.generate(prompts, max_new_tokens=12)
    assert engine.generate(prompts[:1], max_new_tokens=6, num_beams=3) == plain.generate(
        prompts[:1], max_new_tokens=6, num_beams=3
    )
    assert engine.decoder()._module.held_bytes > 0  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"needs at least"):
        engine.generate([prompts[0]] * 400, max_new_tokens=30)


@pytest.mark.slow
def test_an_encoder_decoder_generates_within_a_limit_of_both_graphs() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "vocab_size": 600}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.arange(1, 15).reshape(2, 7)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
    program, limit = bg.capture(model, example), 19_000_000
    plain = bg.compile(program, backend=Torch(generate=True))
    engine: Any = bg.compile(program, [Stream(limit)], backend=Torch(generate=True))
    prompts = ([3, 14, 15, 9], [35], [8, 9, 7])
    assert engine.generate(prompts, max_new_tokens=10) == plain.generate(prompts, max_new_tokens=10)
    (encoder,) = engine.graphs.values()
    assert encoder._memory is engine._memory
    assert engine._memory.mapped <= limit - 16 * 2**20
