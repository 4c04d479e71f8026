"""What inputs hold is found in the dataflow, whatever they are called, and is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bmgraph as bg
from bmgraph.analysis.attention_mask import Mask, read_mask
from bmgraph.analysis.structure.value_origins import walk
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import row_sizes
from bmgraph.passes import KVCache, SoftPrompt
from bmgraph.serialize.program_json import decode, encode
from bmgraph.verify.padding import padding_mask
from bmgraph.verify.reference_outputs import other_batch
from tests.helpers.models import tiny_decoder, tokens

ROWS, LENGTH, WIDTH = 2, 6, 8


def kinds(program: Program) -> dict[str, str]:
    return {spec.name: str(spec.kind) for spec in program.inputs}


def ids(below: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(below, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def real() -> torch.Tensor:
    return torch.tensor([[1] * LENGTH, [1] * (LENGTH - 2) + [0] * 2])


def counted() -> torch.Tensor:
    return torch.arange(LENGTH).repeat(ROWS, 1)


def attend(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Attention as many models write it out: scores, a mask added, a softmax."""
    return ((x @ x.transpose(1, 2))[:, None] + bias).softmax(-1)[:, 0] @ x


class Text(nn.Module):
    """Ids, token types and learned positions, under names that say nothing; `m` is a mask in one of the two conventions."""

    def __init__(self, ones_hide: bool) -> None:
        super().__init__()
        self.ones_hide = ones_hide
        self.a, self.b, self.c = nn.Embedding(11, WIDTH), nn.Embedding(2, WIDTH), nn.Embedding(40, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, m: torch.Tensor, k: torch.Tensor, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        x = self.a(i) + self.b(k) + self.c(n)
        hidden = m if self.ones_hide else 1 - m
        scores: torch.Tensor = self.head(attend(x, hidden[:, None, None, :] * -1e9))
        return scores


@pytest.mark.parametrize("ones_hide", [False, True])
def test_ids_types_positions_and_masks(ones_hide: bool) -> None:
    batch = {"m": 1 - real() if ones_hide else real(), "k": ids(2), "i": ids(11), "n": counted()}
    program = bg.capture(Text(ones_hide).eval(), batch)
    mask = "inverse_mask" if ones_hide else "mask"
    assert kinds(program) == {"m": mask, "k": "token_types", "i": "ids", "n": "positions"}
    assert padding_mask(program, batch) == (None if ones_hide else "m")


class Flat(nn.Module):
    """Attention over 3-D scores: one head [B, S, S], or heads beside the rows [B * H, S, S], with a mask in one of the conventions."""

    def __init__(self, heads: int, ones_hide: bool) -> None:
        super().__init__()
        self.heads, self.ones_hide = heads, ones_hide
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, i: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        x = self.embed(i)
        y = x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)
        hidden = (m == int(self.ones_hide)).repeat_interleave(self.heads, 0)[:, None, :]
        y = (y @ y.transpose(1, 2)).masked_fill(hidden, -1e9).softmax(-1) @ y
        scores: torch.Tensor = self.head(y.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))
        return scores


@pytest.mark.parametrize("ones_hide", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_masks_of_scores_without_an_axis_of_heads(heads: int, ones_hide: bool) -> None:
    """What is trained in front of a text is seen, whatever hides; it is what the model computes with the tokens in front."""
    model = Flat(heads, ones_hide).eval()
    batch = {"i": ids(11), "m": 1 - real() if ones_hide else real()}
    program = bg.capture(model, batch)
    assert kinds(program) == {"i": "ids", "m": "inverse_mask" if ones_hide else "mask"}
    prompted = bg.Pipeline([SoftPrompt(words=(3, 4), tokens=2)]).run(program)
    words = torch.tensor([[3, 4]]).expand(ROWS, -1)
    front = torch.full_like(words, int(not ones_hide))
    with torch.no_grad():
        expected = model(torch.cat([words, batch["i"]], 1), torch.cat([front, batch["m"]], 1))[:, 2:]
    torch.testing.assert_close(prompted(**batch)["output"], expected)


def test_zeros_and_ones_of_unknown_meaning_have_no_value_in_front_of_a_text() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, WIDTH)

        def forward(self, i: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
            x = self.embed(i)
            return attend(x, torch.zeros(())) + m[..., None]

    program = bg.capture(Marked().eval(), {"i": ids(11), "m": real()})
    with pytest.raises(PassError, match="neither its zeros nor its ones hide keys"):
        bg.Pipeline([SoftPrompt(2)]).run(program)


def test_positions_that_become_angles() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, WIDTH)
            self.register_buffer("rates", torch.rand(WIDTH // 2))

        def forward(self, i: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            angles = n[..., None].float() * self.rates
            turned: torch.Tensor = self.embed(i) * torch.cat([angles.cos(), angles.sin()], -1)
            return turned

    program = bg.capture(Rotary().eval(), {"i": ids(11), "n": torch.zeros_like(ids(11))})
    assert kinds(program) == {"i": "ids", "n": "positions"}


def test_labels_and_features() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, f: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(f)
            loss = nn.functional.cross_entropy(logits, y) + nn.functional.mse_loss(logits[:, 0], z)
            return {"loss": loss, "logits": logits}

    batch = {"f": torch.ones(5, 4), "y": torch.tensor([0, 1, 1, 0, 1]), "z": torch.randn(5)}
    assert kinds(bg.capture(Two(), batch)) == {"f": "features", "y": "labels", "z": "labels"}


class Pooled(nn.Module):
    """No attention: positions are summed where an input says so."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embed, self.weigh = how, nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, i: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        x = self.embed(i)
        if self.how == "mean":
            return (x * m[..., None]).sum(1) / m.sum(1, keepdim=True)
        if self.how == "most":
            return x.masked_fill(m[..., None] == 0, -1e9).amax(1)
        if self.how == "inverse":
            return torch.where(m[..., None] == 1, 0.0, x).sum(1)
        if self.how == "weighed":
            weights = self.weigh(x).squeeze(-1).masked_fill(m == 0, -1e9).softmax(-1)
            return (weights[..., None] * x).sum(1)
        if self.how == "replaced":
            return (x * (1 - m)[..., None] + self.embed.weight[0] * m[..., None]).sum(1)
        return x + m[..., None]


@pytest.mark.parametrize(
    ("how", "kind"),
    [("mean", "mask"), ("most", "mask"), ("inverse", "inverse_mask"), ("weighed", "mask"), ("replaced", "other"),
     ("added", "other")],
)  # fmt: skip
def test_a_mask_without_attention(how: str, kind: str) -> None:
    program = bg.capture(Pooled(how), {"i": ids(11), "m": real()})
    assert kinds(program) == {"i": "ids", "m": kind}


def test_a_bias_of_scores() -> None:
    class Biased(nn.Module):
        def forward(self, f: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return attend(f, w)

    batch = {"f": torch.randn(2, 5, 8), "w": torch.randn(2, 1, 5, 5)}
    assert kinds(bg.capture(Biased(), batch)) == {"f": "features", "w": "attention_bias"}


def test_the_kind_is_saved_and_found_anew_for_early_files(tmp_path: Path) -> None:
    batch = {"m": real(), "k": ids(2), "i": ids(11), "n": counted()}
    program = bg.capture(Text(False).eval(), batch)
    program.save(str(tmp_path / "program"))
    loaded: Any = bg.load(tmp_path / "program")
    assert kinds(loaded) == kinds(program)
    data = encode(program)
    for spec in data["inputs"]:
        del spec["kind"]
    early = decode(data, program.tensors(), program.example)
    assert {spec.kind for spec in early.inputs} == {None}
    assert kinds(bg.Pipeline([]).run(early)) == kinds(program)
    data["inputs"][0]["kind"] = "secret"
    with pytest.raises(BundleError, match=r"'m' has the kind 'secret': expected one of ids"):
        decode(data, program.tensors(), program.example)


class Decoder(nn.Module):
    """Causal attention over ids, with a boolean mask in one of the two conventions, and positions."""

    def __init__(self, ones_hide: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ones_hide, self.embed, self.places = ones_hide, nn.Embedding(11, WIDTH), nn.Embedding(40, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, i: torch.Tensor, m: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        x = self.embed(i) + self.places(n)
        seen = (~m if self.ones_hide else m)[:, None, None, :] & torch.ones(
            i.shape[1], i.shape[1]
        ).tril().bool()
        q, k, v = (item(x).unflatten(-1, (2, -1)).transpose(1, 2) for item in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        logits: torch.Tensor = (x + mixed.transpose(1, 2).flatten(2)) @ self.embed.weight.T
        return logits


def decoder_batch(ones_hide: bool = False) -> dict[str, torch.Tensor]:
    return {"i": ids(11), "m": (real() != ones_hide).bool(), "n": counted()}


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_decoder_generates_whatever_its_inputs_are_called_and_hold(backend: str) -> None:
    cached = bg.Pipeline([KVCache()]).run(bg.capture(Decoder(), decoder_batch()))
    assert kinds(cached) == {
        "i": "ids", "m": "mask", "n": "positions", "past_key_0": "cache", "past_value_0": "cache", "scored_positions": "scored",
    }  # fmt: skip
    engine = bg.compile(cached, backend=backend)
    prompts = [[1, 2, 3, 4], [5, 6]]
    together = engine.generate(prompts, max_new_tokens=5)
    assert together == [engine.generate([prompt], max_new_tokens=5)[0] for prompt in prompts]


def test_what_generation_cannot_supply_is_refused() -> None:
    inverse = bg.capture(Decoder(True), decoder_batch(True))
    with pytest.raises(PassError, match="input 'm' marks padding with ones"):
        bg.Pipeline([KVCache()]).run(inverse)
    types = bg.capture(Decoder(), {**decoder_batch(), "n": ids(3, 1)})
    assert kinds(types)["n"] == InputKind.TOKEN_TYPES
    with pytest.raises(PassError, match="input 'n' has a value for each token that generation cannot supply"):
        bg.Pipeline([KVCache()]).run(types)


class Translator(nn.Module):
    """An encoder whose mask marks padding with ones, and a decoder without a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.source, self.target = nn.Embedding(11, 8), nn.Embedding(13, 8)
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, i: torch.Tensor, m: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        attend, seen = nn.functional.scaled_dot_product_attention, ~m[:, None, None, :]
        memory, y = self.heads(self.source(i)), self.target(d)
        memory, x = memory + attend(memory, memory, memory, seen), self.heads(y)
        x = x + attend(x, self.heads(self.key(y)), self.heads(self.value(y)), is_causal=True)
        x = x + attend(x, memory, memory, seen)
        logits: torch.Tensor = x.transpose(1, 2).flatten(2) @ self.target.weight.T
        return logits

    @staticmethod
    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_encoder_gets_the_mask_that_it_takes(backend: str) -> None:
    target = torch.randint(13, (ROWS, 4), generator=torch.Generator().manual_seed(2))
    program = bg.capture(Translator(), {"i": ids(11), "m": real() == 0, "d": target})
    assert kinds(program) == {"i": "ids", "m": "inverse_mask", "d": "ids"}
    engine = bg.compile(bg.Pipeline([KVCache()]).run(program), backend=backend)
    prompts = [[1, 2, 3, 4, 9], [5, 6]]
    together = engine.generate(prompts, max_new_tokens=4, start=0)
    assert together == [engine.generate([prompt], max_new_tokens=4, start=0)[0] for prompt in prompts]


def test_rows_are_rows_whatever_their_number_is_called() -> None:
    """Masks are read at other numbers of rows than of positions, also where a file calls neither `batch`."""
    program = bg.capture(tiny_decoder(layers=1), tokens())
    names: dict[Any, Any] = {"batch": "texts", "sequence": "words"}
    data = encode(program)
    for spec in (*data["inputs"], *data["outputs"]):
        spec["shape"] = [names.get(dim, dim) for dim in spec["shape"]]
    data["ranges"] = {names[name]: bounds for name, bounds in data["ranges"].items()}
    renamed = decode(data, program.tensors(), program.example)
    assert row_sizes(renamed.inputs) == {"texts"}
    (core,), (other,) = (walk(item.graph).cores for item in (program, renamed))
    assert read_mask(renamed, other.mask) == read_mask(program, core.mask) == Mask("attention_mask", True)
    found, expected = (other_batch(item, item.example) for item in (renamed, program))
    assert found is not None
    assert expected is not None
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Looked(nn.Module):
    """Ids in a table of 11, positions in one of 40, token types in one of 2: those that there are, beside embeddings or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.ids, self.places, self.types = (
            nn.Embedding(11, WIDTH),
            nn.Embedding(40, WIDTH),
            nn.Embedding(2, WIDTH),
        )
        self.head = nn.Linear(WIDTH, 3)
        self.tied = tied

    def forward(
        self,
        i: torch.Tensor | None = None,
        n: torch.Tensor | None = None,
        k: torch.Tensor | None = None,
        x: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found = [
            table(item)
            for table, item in ((self.ids, i), (self.places, n), (self.types, k))
            if item is not None
        ]
        y = sum(found, torch.zeros(WIDTH) if x is None else x).tanh()
        scores: torch.Tensor = y @ self.ids.weight.T if self.tied else self.head(y)
        return scores


SAME = torch.zeros(ROWS, LENGTH, dtype=torch.long)
EMBEDDED = torch.randn(ROWS, LENGTH, WIDTH)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "batch",
    [{"i": counted(), "k": SAME}, {"i": counted()}, {"n": counted(), "x": EMBEDDED}, {"i": ids(11), "n": counted(), "k": SAME},
     {"n": counted(), "k": SAME, "x": EMBEDDED}],
)  # fmt: skip
def test_an_example_that_counts_up_makes_no_positions_of_ids(
    batch: dict[str, torch.Tensor], tied: bool
) -> None:
    known = {"i": "ids", "n": "positions", "k": "token_types", "x": "features"}
    assert kinds(bg.capture(Looked(tied).eval(), batch)) == {name: known[name] for name in batch}


def test_a_table_that_scores_is_that_of_the_ids_whatever_the_example_holds() -> None:
    for i, n, k in ((counted(), ids(11), SAME), (counted(), ids(11), ids(2)), (SAME, counted(), SAME)):
        found = kinds(bg.capture(Looked(True).eval(), {"i": i, "n": n, "k": k}))
        assert (found["i"], found["k"]) == ("ids", "token_types")
