"""The text form of passes: a round trip gives an equal pass, and bad text is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmgraph.errors import InputError
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.pass_manager.pass_spec import parse_passes, recorded_text
from bmgraph.passes import LoRA, Quantize, known_passes


@dataclass(frozen=True, repr=False)
class Everything(ModelPass):
    """A pass with an option of every type."""

    word: str = "a"
    number: float = 0.5
    count: int = 1
    flag: bool = False
    maybe: str | None = None
    many: tuple[object, ...] = ()

    def run(self, program: Program, context: Context) -> Program:
        return program


@dataclass(frozen=True, repr=False)
class Revised(ModelPass):
    """A pass whose defaults changed twice."""

    version: ClassVar[int] = 3
    former_defaults: ClassVar[Mapping[int, Mapping[str, object]]] = {
        1: {"size": 1, "mode": "old"},
        2: {"size": 2},
    }

    size: int = 3
    mode: str = "new"

    def run(self, program: Program, context: Context) -> Program:
        return program


KNOWN = {"everything": Everything, "revised": Revised}
SCALARS = st.one_of(
    st.text(max_size=20), st.integers(-(10**9), 10**9), st.floats(allow_nan=False), st.booleans(), st.none()
)


@given(
    st.text(max_size=20), st.floats(allow_nan=False), st.integers(-(10**12), 10**12), st.booleans(),
    st.none() | st.text(max_size=8), st.lists(SCALARS | st.lists(SCALARS, max_size=3).map(tuple), max_size=4).map(tuple),
)  # fmt: skip
def test_text_round_trip(
    word: str, number: float, count: int, flag: bool, maybe: str | None, many: tuple[object, ...]
) -> None:
    item = Everything(word, number, count, flag, maybe, many)
    assert parse_passes(repr(item), KNOWN) == [item]
    assert parse_passes(f"{item}, {item}", KNOWN) == [item, item]


def test_lists_and_one_string_are_tuples() -> None:
    assert Everything(many=["a", ["b"]]).many == ("a", ("b",))  # type: ignore[arg-type]
    assert Everything(many="a").many == ("a",)  # type: ignore[arg-type]
    assert Quantize(exclude="head") == Quantize(exclude=("head",))  # type: ignore[arg-type]
    assert parse_passes("lora{targets=q_proj}", known_passes())[0] == LoRA(targets=("q_proj",))


def test_unknown_options_are_told() -> None:
    for name, message in (
        ("aplha", "'lora' has no option 'aplha'; did you mean 'alpha'"),
        ("lora_alphas", "'lora' has no option 'lora_alphas'"),
    ):
        with pytest.raises(InputError, match=message):
            LoRA(**{name: 1})
        with pytest.raises(InputError, match=message):
            parse_passes(f"lora{{{name}=1}}", known_passes())


def test_names_of_other_libraries_are_taken() -> None:
    own = LoRA(r=4, alpha=3, targets=("q_proj",), layers=(0, 1))
    given = {"rank": 4, "lora_alpha": 3, "target_modules": ["q_proj"], "layers_to_transform": [0, 1]}
    assert LoRA(**given) == own  # type: ignore[arg-type]
    text = "lora{rank=4,lora_alpha=3,target_modules=q_proj,layers_to_transform=[0,1]}"
    assert parse_passes(text, known_passes()) == [own]
    with pytest.raises(InputError, match="'lora' is given 'alpha' and 'lora_alpha', which are one option"):
        LoRA(**{"alpha": 1, "lora_alpha": 1})


def test_a_recorded_text_keeps_the_defaults_of_its_version() -> None:
    for text, found in (
        ("revised", Revised(1, "old")),
        ("revised{mode=mine}", Revised(1, "mine")),
        ("revised@2", Revised(2, "new")),
        ("revised@2{size=7}", Revised(7, "new")),
        ("revised@3", Revised()),
    ):
        assert parse_passes(text, KNOWN, recorded=True) == [found]
        assert parse_passes(recorded_text(found), KNOWN, recorded=True) == [found]
    assert parse_passes("revised, everything", KNOWN) == [Revised(), Everything()]
    assert parse_passes("revised@1", KNOWN) == [Revised(1, "old")]
    assert (recorded_text(Revised()), recorded_text(Everything("b"))) == ("revised@3", "everything{word=b}")
    assert parse_passes("quantize", known_passes(), recorded=True) == [Quantize(smooth=False)]


@pytest.mark.parametrize("text", ["revised@4", "revised@0", "revised@", "revised@x", "everything@2"])
def test_a_version_that_is_not_known_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="has no version"):
        parse_passes(text, KNOWN, recorded=True)


def test_defaults_are_left_out() -> None:
    assert repr(Quantize("int8")) == "quantize"
    assert (
        repr(Quantize(activations="static", exclude=("*.head",)))
        == "quantize{activations=static,exclude=[*.head]}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quantise", "no pass is called 'quantise'; did you mean 'quantize'"),
        ("quantize{shceme=int8}", "no option 'shceme'; did you mean 'scheme'"),
        ("quantize{scheme=int5}", "scheme='int5': choose one of int8"),
        ("quantize{scheme=int8", "expected '}', found 'the end'"),
        ("quantize,", "end with a comma"),
        ("quantize{scheme=int8,scheme=int8}", "given twice"),
        ("quantize{exclude=[[[[[[[[[[[[1]]]]]]]]]]]]}", "nested too deeply"),
        ("quantize(", "cannot read"),
        ("__import__", "no pass is called"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        parse_passes(text, known_passes())


def test_options_are_scalars_strings_and_tuples() -> None:
    with pytest.raises(InputError, match="option 'many' of Everything is a set"):
        Everything(many=({1},))
