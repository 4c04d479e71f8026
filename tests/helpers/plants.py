"""Planted wrong passes: each does something else than it says, in a place that a small example hides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

import bmgraph as bg
from bmgraph.ir.editor import remove_dead
from bmgraph.ir.node_role import NodeRole, ends_delta, has_role
from bmgraph.ir.program import Program, output_node, placeholders, tensor_nodes
from bmgraph.ir.tensor_spec import Range
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import ModelPass
from bmgraph.passes import (
    Cast,
    Deltas,
    Distill,
    KVCache,
    LoadDelta,
    LoRA,
    Merge,
    MoEfy,
    Prune,
    Quantize,
    Shrink,
    Smooth,
    SoftPrompt,
    SplitOutliers,
)
from tests.helpers.deltas import trained
from tests.helpers.models import Block, enlarge

aten = torch.ops.aten
Fault = Callable[[Program], Program | None]

WORDS, LONGEST = 50, 64
MANY_WORDS = 5000


class Toy(nn.Module):
    """A decoder that counts positions over its mask; every step is a method, so that a variant can get it wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, 32), nn.Embedding(LONGEST, 32)
        self.blocks = nn.ModuleList(Block(32, 4, 64) for _ in range(2))
        self.head = nn.Linear(32, WORDS, bias=False)

    def ids(self, ids: torch.Tensor) -> torch.Tensor:
        return ids

    def positions(self, mask: torch.Tensor) -> torch.Tensor:
        return (mask.cumsum(1) - 1).clamp(min=0)

    def visible(self, mask: torch.Tensor) -> torch.Tensor:
        """bool[B, 1, L, L] or one that broadcasts to it: which key a query sees."""
        place = torch.arange(mask.shape[1])
        return (place[None, :] <= place[:, None]) & mask.bool()[:, None, None, :]

    def layer(self, index: int, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.blocks[index](x, visible)
        return out

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """ids, attention_mask i64[B, L] -> f[B, L, WORDS]."""
        x = self.embed(self.ids(ids)) + self.places(self.positions(attention_mask))
        for index in range(len(self.blocks)):
            x = self.layer(index, x, self.visible(attention_mask))
        logits: torch.Tensor = self.head(x)
        return logits


class ManyWords(Toy):
    """More words than a batch holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(MANY_WORDS, 32)


class Normed(nn.Module):
    """Batch norm, a buffer and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16)
        self.norm, self.drop, self.mix = nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.randn(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids i64[B] -> f[B, WORDS]."""
        x = self.norm(self.mix(self.embed(ids)) + self.offset)
        logits: torch.Tensor = self.head(self.drop(torch.relu(x)))
        return logits


def _toy(kind: type[nn.Module] = Toy, **methods: Callable[..., Any]) -> nn.Module:
    """A model with the same weights each time, large enough that a mistake shows."""
    torch.manual_seed(0)
    model = type("Variant", (kind,), methods)().eval()
    enlarge(model)
    return model


def batch(rows: int = 3, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Ids, with padding behind them: what users give as an example."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor([max(1, length - row) for row in range(rows)])
    return {
        "ids": torch.randint(0, WORDS - 5, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < kept[:, None]).long(),
    }


@cache
def _decoder() -> Program:
    return bg.capture(_toy(), batch())


@cache
def _many() -> Program:
    return bg.capture(_toy(ManyWords), batch())


@cache
def _normed() -> Program:
    return bg.capture(_toy(Normed).train(), (torch.arange(6) * 7,))


@cache
def _half() -> Program:
    return bg.capture(_toy().bfloat16(), batch())


@cache
def _tuned() -> Program:
    return trained(bg.Pipeline([LoRA(r=2)]).run(_decoder()))


PROGRAMS: dict[str, Callable[[], Program]] = {
    "decoder": _decoder,
    "many": _many,
    "normed": _normed,
    "half": _half,
    "tuned": _tuned,
}


def _delta(seed: int) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        path = folder / f"delta{seed}"
        if not path.exists():
            trained(bg.Pipeline([LoRA(r=2)]).run(_decoder()), seed).save_delta(str(path))
        return str(path)

    return save


RESOURCES: Mapping[str, Callable[[Path], Any]] = {
    "delta": _delta(1),
    "other": _delta(2),
    "teacher": lambda folder: _decoder(),
    "text": lambda folder: [batch(4, 8, seed) for seed in range(2)],
}


@dataclass(frozen=True, repr=False)
class Harmless(ModelPass):
    """Declares itself exact, and names the tensors that a fault changes."""

    named: tuple[str, ...] = ()

    def run(self, program: Program, context: Context) -> Program:
        """Change nothing."""
        for name in self.named or ("everywhere",):
            context.edited(name, "a planted fault")
        return program


def _with_own_tensors(program: Program) -> Program:
    """A copy that shares no storage: some plants write into weights in place, and captured programs are kept."""
    own = program.clone()
    own.parameters = {name: tensor.clone() for name, tensor in program.parameters.items()}
    own.buffers = {name: tensor.clone() for name, tensor in program.buffers.items()}
    return own


@dataclass(frozen=True)
class Plant:
    """A pass, the program that it runs on, and what it does wrong after its work."""

    name: str
    on: str
    item: ModelPass
    fault: Fault
    resources: tuple[str, ...] = ()
    trains: bool = False

    def run(self, folder: Path) -> Program:
        """The program of the wrong pass, if nothing stops it."""
        fault, original = self.fault, type(self.item)

        def run(item: Any, program: Program, context: Context) -> Program:
            made = original.run(item, program, context)
            other = fault(made)
            made = made if other is None else replace(other, history=made.history)
            remove_dead(made)
            return made

        kind: Any = type(f"Faulty{original.__name__}", (original,), {"run": run})
        options = {field: getattr(self.item, field) for field in (item.name for item in fields(self.item))}
        calibration = [batch(4, 8, seed) for seed in range(4)] if self.on == "decoder" else None
        return bg.Pipeline([kind(**options)]).run(
            _with_own_tensors(PROGRAMS[self.on]()),
            calibration=calibration,
            resources={name: RESOURCES[name](folder) for name in self.resources},
            trains=self.trains,
        )


def variant(**methods: Callable[..., Any]) -> Fault:
    """The program of a model that gets a step wrong, with the same weights."""
    return lambda program: bg.capture(_toy(**methods), batch())


def nodes(program: Program, target: object) -> list[fx.Node]:
    """The calls of an operator, in order."""
    return [node for node in program.graph.nodes if node.target is target]


def put(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """Change a tensor."""

    def fault(program: Program) -> None:
        table = program.parameters if name in program.parameters else program.buffers
        table[name] = how(table[name].clone())

    return fault


def swapped(one: str, other: str) -> Fault:
    """Exchange two tensors."""

    def fault(program: Program) -> None:
        table = program.parameters
        table[one], table[other] = table[other], table[one]

    return fault


def first(end: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """Change the first parameter whose name has an end."""
    return lambda program: put(next(name for name in program.parameters if name.endswith(end)), how)(program)


def _row(value: torch.Tensor, index: int, how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    value[index] = how(value[index])
    return value


def _causal(sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Fault:
    """Other keys are visible: `sees` of the places of query and key."""

    def visible(self: Toy, mask: torch.Tensor) -> torch.Tensor:
        place = torch.arange(mask.shape[1])
        return sees(place[:, None], place[None, :]) & mask.bool()[:, None, None, :]

    return variant(visible=visible)


def _query_axis(self: Toy, mask: torch.Tensor) -> torch.Tensor:
    place = torch.arange(mask.shape[1])
    return (place[None, :] <= place[:, None]) & mask.bool()[:, None, :, None]


def _masked(how: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """Other positions count as real."""
    return variant(
        visible=lambda self, mask: Toy.visible(self, how(mask)),
        positions=lambda self, mask: Toy.positions(self, how(mask)),
    )


def _drop_mask(program: Program) -> None:
    """The second attention sees all keys that are not hidden by order; the first attention keeps its mask."""
    core = nodes(program, aten.scaled_dot_product_attention.default)[-1]
    core.update_arg(3, None)


def _wrong_scale(program: Program) -> None:
    nodes(program, aten.scaled_dot_product_attention.default)[-1].update_kwarg("scale", 0.3)


def _swap_keys_and_values(program: Program) -> None:
    core = nodes(program, aten.scaled_dot_product_attention.default)[-1]
    core.args = (core.args[0], core.args[2], core.args[1], *core.args[3:])


def _other_activation(program: Program) -> None:
    nodes(program, aten.gelu.default)[0].target = aten.silu.default


def _tanh_activation(program: Program) -> None:
    nodes(program, aten.gelu.default)[0].update_kwarg("approximate", "tanh")


def _drop_bias(program: Program) -> None:
    node = next(node for node in nodes(program, aten.linear.default) if len(node.args) > 2)
    node.args = node.args[:2]


def _drop_residual(program: Program) -> None:
    norm = nodes(program, aten.layer_norm.default)[0]
    total: Any = norm.args[0]
    total.replace_all_uses_with(total.args[0])


def _epsilon(program: Program) -> None:
    nodes(program, aten.layer_norm.default)[1].update_arg(4, 0.1)


def _double(program: Program) -> None:
    """The logits are twice as large."""
    output = output_node(program.graph)
    values: Any = output.args[0]
    with program.edit() as editor:
        double = editor.call(aten.mul.Tensor, values[0], 2.0, like=values[0], after=values[0])
    output.args = ((double, *values[1:]),)


def _promote(program: Program) -> None:
    output = output_node(program.graph)
    values: Any = output.args[0]
    with program.edit() as editor:
        wide = editor.call(aten.to.dtype, values[0], torch.float64, like=values[0], after=values[0])
    output.args = ((wide, *values[1:]),)


def _dropout(probability: float) -> Fault:
    def fault(program: Program) -> None:
        nodes(program, aten.dropout.default)[0].update_arg(1, probability)

    return fault


def _lose_dropout(program: Program) -> None:
    node = nodes(program, aten.dropout.default)[0]
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _add_dropout(program: Program) -> None:
    norm = nodes(program, aten.layer_norm.default)[0]
    with program.edit() as editor:
        dropped = editor.call(aten.dropout.default, norm, 0.3, True, like=norm, after=norm)
        editor.replace(norm, dropped)


def _freeze(program: Program) -> None:
    program.frozen |= {"blocks.0.q.weight"}


def _thaw(program: Program) -> None:
    program.frozen -= {next(iter(program.frozen & {n for n in program.parameters if n.endswith("q.weight")}))}


def _narrow(program: Program) -> None:
    name = next(dim for dim in program.inputs[0].shape if isinstance(dim, str))
    program.ranges[name] = Range(1, 2000)


def _in_place(program: Program) -> None:
    program.parameters["blocks.0.q.weight"].add_(1e-9)


def _untie(program: Program) -> None:
    program.ties = {}


def _detach(program: Program) -> None:
    """A branch passes no gradient back."""
    norm = nodes(program, aten.layer_norm.default)[0]
    with program.edit() as editor:
        editor.replace(norm, editor.call(aten.detach.default, norm, like=norm, after=norm))


def _reverse_gradient(program: Program) -> None:
    """x in value, -x in gradient."""
    norm = nodes(program, aten.layer_norm.default)[0]
    with program.edit() as editor:
        held = editor.call(aten.detach.default, norm, like=norm, after=norm)
        twice = editor.call(aten.mul.Tensor, held, 2.0, like=norm, after=held)
        editor.replace(norm, new := editor.call(aten.sub.Tensor, twice, norm, like=norm, after=twice))
        held.args = (norm,)
        new.args = (twice, norm)


def _momentum(program: Program) -> None:
    nodes(program, aten.batch_norm.default)[0].update_arg(6, 0.9)


def _running_statistics(program: Program) -> None:
    nodes(program, aten.batch_norm.default)[0].update_arg(5, False)


def _four_bits(program: Program) -> None:
    for name in [name for name in program.parameters if name.endswith("_codes")]:
        codes, scale = program.parameters[name], program.parameters[name.replace("_codes", "_scale")]
        value = codes.float() * scale[:, None]
        step = value.abs().amax(1) / 7
        program.parameters[name] = (value / step[:, None]).round().clamp(-7, 7).to(torch.int8)
        program.parameters[name.replace("_codes", "_scale")] = step


def _larger_scale(program: Program) -> None:
    name = next(name for name in program.parameters if name.endswith("_codes"))
    codes, scale = program.parameters[name], program.parameters[name.replace("_codes", "_scale")]
    step = scale * 1.15
    program.parameters[name] = (codes.float() * (scale / step)[:, None]).round().to(torch.int8)
    program.parameters[name.replace("_codes", "_scale")] = step


def _change(program: Program) -> Any:
    """The call that scales the first delta."""
    total = next(node for node in program.graph.nodes if ends_delta(node))
    return total.args[1]


def _delta_scale(factor: float) -> Fault:
    def fault(program: Program) -> None:
        change = _change(program)
        change.update_arg(1, change.args[1] * factor)

    return fault


def _delta_input(program: Program) -> None:
    """The delta reads the linear's output instead of its input (both are as wide)."""
    change = _change(program)
    down = change.args[0].args[0]
    norm = nodes(program, aten.embedding.default)[0]
    down.update_arg(0, norm)


def _keep_smallest(program: Program) -> None:
    for name in [name for name in program.parameters if name.endswith("_mask")]:
        program.parameters[name] = ~program.parameters[name]


def _keep_three(program: Program) -> None:
    name = next(name for name in program.parameters if name.endswith("_mask"))
    mask = program.parameters[name].clone().reshape(-1, 4)
    mask[:, 0] = True
    program.parameters[name] = mask.reshape(program.parameters[name].shape)


def _all_zero(program: Program) -> None:
    name = next(name for name in program.parameters if name.endswith("_mask"))
    mask = program.parameters[name].clone()
    mask[0, :4] = False
    program.parameters[name] = mask


def _router_sum(program: Program) -> None:
    node = next(
        node
        for node in program.graph.nodes
        if has_role(node, NodeRole.NEURONS) and node.target is aten.sum.dim_IntList
    )
    with program.edit() as editor:
        editor.replace(node, editor.call(aten.mul.Tensor, node, 0.5, like=node, after=node))


def _select_first_row(program: Program) -> None:
    """All rows take the delta of the first."""
    chooser = placeholders(program.graph)["delta"]
    users = list(chooser.users)
    with program.edit() as editor:
        one = editor.call(aten.slice.Tensor, chooser, 0, 0, 1, like=chooser, after=chooser)
        rows = editor.call(aten.sym_size.int, chooser, 0, like=chooser, after=one)
        same = editor.call(aten.expand.default, one, [rows], like=chooser, after=rows)
    for user in users:
        user.replace_input_with(chooser, same)


def _cast_row(program: Program) -> None:
    put("blocks.0.q.weight", lambda w: _row(w, 3, torch.zeros_like))(program)


def _cached_position(program: Program) -> None:
    lookup = nodes(program, aten.embedding.default)[1]
    index: Any = lookup.args[1]
    with program.edit() as editor:
        moved = editor.call(aten.add.Tensor, index, 1, like=lookup, before=lookup)
        lookup.update_arg(
            1, editor.call(aten.clamp.default, moved, 0, LONGEST - 1, like=lookup, before=lookup)
        )


def _swap_present(program: Program) -> None:
    output = output_node(program.graph)
    values: Any = list(output.args[0])  # type: ignore[arg-type]
    values[1], values[2] = values[2], values[1]
    output.args = (tuple(values),)


def _roll_delta(program: Program) -> None:
    name = next(name for name in program.parameters if name.endswith("_lora_a"))
    program.parameters[name] = program.parameters[name].roll(1, 1)


def _read(program: Program, name: str, other: str) -> None:
    reads = tensor_nodes(program.graph)
    reads[name].replace_all_uses_with(reads[other])


exact = Harmless()
Q, LAYERS = "blocks.0.q.weight", "blocks.0"

EXACT = [
    Plant("left padding read as padding behind", "decoder", exact, _masked(lambda m: (torch.arange(m.shape[1])[None] < m.sum(1, keepdim=True)).long())),
    Plant("holes in a mask are filled", "decoder", exact, _masked(lambda m: m.cummax(1).values)),
    Plant("the first position is always real", "decoder", exact, _masked(lambda m: torch.cat([torch.ones_like(m[:, :1]), m[:, 1:]], 1))),
    Plant("the second position is always real", "decoder", exact, _masked(lambda m: torch.cat([m[:, :1], torch.ones_like(m[:, :1]), m[:, 2:]], 1))),
    Plant("a mask on the query axis", "decoder", exact, variant(visible=_query_axis)),
    Plant("positions clamped at 16", "decoder", exact, variant(positions=lambda self, m: Toy.positions(self, m).clamp(max=16))),
    Plant("positions not counted over the mask", "decoder", exact, variant(positions=lambda self, m: torch.arange(m.shape[1]).expand(m.shape))),
    Plant("positions counted modulo 32", "decoder", exact, variant(positions=lambda self, m: Toy.positions(self, m) % 32)),
    Plant("causality lost beyond 30", "decoder", exact, _causal(lambda q, k: (k <= q) | (k > 30))),
    Plant("a sliding window of 20", "decoder", exact, _causal(lambda q, k: (k <= q) & (k > q - 20))),
    Plant("the first key is lost beyond 25", "decoder", exact, _causal(lambda q, k: (k <= q) & ((k > 0) | (q < 25)))),
    Plant("a query does not see itself beyond 12", "decoder", exact, _causal(lambda q, k: (k < q) | ((k == q) & (q <= 12)))),
    Plant("ids above 44 are one word", "decoder", exact, variant(ids=lambda self, ids: ids.clamp(max=44))),
    Plant("the last word is another", "decoder", exact, variant(ids=lambda self, ids: torch.where(ids == WORDS - 1, 3, ids))),
    Plant("one rare embedding row, named", "decoder", Harmless(("embed.weight",)), put("embed.weight", lambda w: _row(w, 47, torch.zeros_like))),
    Plant("one rare position, named", "decoder", Harmless(("places.weight",)), put("places.weight", lambda w: _row(w, 40, torch.zeros_like))),
    Plant("one row of thousands, named", "many", Harmless(("embed.weight",)), put("embed.weight", lambda w: _row(w, 4321, torch.zeros_like))),
    Plant("one rare embedding row, not named", "decoder", exact, put("embed.weight", lambda w: _row(w, 47, torch.zeros_like))),
    Plant("rows after the eighth are the first", "decoder", exact, variant(ids=lambda self, ids: torch.where(torch.arange(ids.shape[0])[:, None] < 8, ids, ids[:1]))),
    Plant("rows after the eighth are not masked", "decoder", exact, _masked(lambda m: torch.where(torch.arange(m.shape[0])[:, None] < 8, m, 1))),
    Plant("a layer forgets the mask", "decoder", exact, variant(layer=lambda self, i, x, v: Toy.layer(self, i, x, v if i == 0 else v.any(0, keepdim=True).any(1, keepdim=True)))),
    Plant("a weight moved by one last bit, not named", "decoder", exact, put(Q, lambda w: w * (1 + 1e-7))),
    Plant("a weight in another dtype", "decoder", exact, put("head.weight", lambda w: w.double())),
    Plant("a weight written in place", "decoder", exact, _in_place),
    Plant("a buffer moved, not named", "normed", exact, put("offset", lambda b: b * (1 + 1e-7))),
    Plant("a trainable parameter frozen", "decoder", exact, _freeze),
    Plant("a frozen parameter made trainable", "tuned", exact, _thaw),
    Plant("a tie lost", "normed", exact, _untie),
    Plant("a range changed", "decoder", exact, _narrow),
    Plant("dropout of 0.5 instead of 0.1", "decoder", exact, _dropout(0.5)),
    Plant("dropout of 0", "decoder", exact, _dropout(0.0)),
    Plant("dropout lost", "decoder", exact, _lose_dropout),
    Plant("dropout added", "decoder", exact, _add_dropout),
    Plant("an output promoted to fp64", "decoder", exact, _promote),
    Plant("batch norm with another momentum", "normed", exact, _momentum),
    Plant("batch norm trains on running statistics", "normed", exact, _running_statistics),
    Plant("a gradient stopped", "decoder", exact, _detach, trains=True),
    Plant("a gradient reversed", "decoder", exact, _reverse_gradient, trains=True),
    Plant("a tanh in place of erf", "decoder", exact, _tanh_activation),
    Plant("a large epsilon", "decoder", exact, _epsilon),
    Plant("keys and values swapped", "decoder", exact, _swap_keys_and_values),
    Plant("logits doubled", "decoder", exact, _double),
]  # fmt: skip

int8 = Quantize("int8", activations="none")
static = Quantize("int8", activations="static", outliers=False)
lora = LoRA(r=2)
prune, shrink = Prune(), Shrink(ffn=0.25, heads=0.25)
moefy = MoEfy(experts=8, active=4)
cache_ = KVCache()

ENDS: dict[str, tuple[str, ModelPass, tuple[str, ...]]] = {
    "quantize": ("decoder", int8, ()),
    "static quantize": ("decoder", static, ()),
    "lora": ("decoder", lora, ()),
    "prune": ("decoder", prune, ()),
    "shrink": ("decoder", shrink, ()),
    "moefy": ("decoder", moefy, ()),
    "kv cache": ("decoder", cache_, ()),
    "merge": ("tuned", Merge(), ()),
    "load delta": ("decoder", LoadDelta(), ("delta",)),
    "deltas": ("decoder", Deltas(("delta", "other")), ("delta", "other")),
    "split outliers": ("decoder", SplitOutliers(), ()),
    "smooth": ("decoder", Smooth(), ()),
    "cast": ("half", Cast("fp32"), ()),
    "distill": ("decoder", Distill(on="outputs", steps=1), ("teacher", "text")),
    "soft prompt": ("decoder", SoftPrompt(tokens=4), ()),
}
"""Name of a pass in plants -> the program it runs on, the pass, its resources."""

COMMON: dict[str, Fault] = {
    "an attention's mask dropped": _drop_mask,
    "an attention's scale changed": _wrong_scale,
    "another activation": _other_activation,
    "a bias dropped": _drop_bias,
    "a residual dropped": _drop_residual,
    "keys and values swapped": _swap_keys_and_values,
}


def _of(kind: str, name: str, fault: Fault) -> Plant:
    on, item, resources = ENDS[kind]
    return Plant(f"{kind}: {name}", on, item, fault, resources)


OWN = [
    _of("quantize", "4 bits everywhere", _four_bits),
    _of("quantize", "a scale 15% too large", _larger_scale),
    _of("quantize", "a scale 2% too small", first("_scale", lambda s: s * 0.98)),
    _of("quantize", "codes moved by one", first("_codes", lambda c: (c + 1).clamp(max=127))),
    _of("quantize", "two layers' codes swapped", swapped("blocks.0.q.weight_codes", "blocks.0.k.weight_codes")),
    _of("static quantize", "a scale of activations halved", first("_input_scale", lambda s: s / 2)),
    _of("lora", "the scale doubled", _delta_scale(2)),
    _of("lora", "the wrong input", _delta_input),
    _of("lora", "the backbone left trainable", _thaw),
    _of("prune", "keeps the smallest", _keep_smallest),
    _of("prune", "keeps three of four", _keep_three),
    _of("prune", "a group of zeros", _all_zero),
    _of("prune", "kept weights scaled", put(Q, lambda w: w * 1.02)),
    _of("shrink", "columns rolled", put("blocks.0.down.weight", lambda w: w.roll(1, 1))),
    _of("shrink", "a norm scaled", put("blocks.1.second.weight", lambda w: w * 1.02)),
    _of("shrink", "half the values of a head", put("blocks.0.v.weight", lambda w: torch.cat([w[:4] * 0.5, w[4:]]))),
    _of("moefy", "the sum halved", _router_sum),
    _of("moefy", "experts rolled", put("blocks.0.down.weight", lambda w: w.roll(1, 0))),
    _of("kv cache", "positions moved by one", _cached_position),
    _of("kv cache", "keys and values stored in each other's place", _swap_present),
    _of("kv cache", "a weight changed", put(Q, lambda w: w * 1.01)),
    _of("merge", "a merged weight scaled", put(Q, lambda w: w * 1.01)),
    _of("load delta", "the scale doubled", _delta_scale(2)),
    _of("load delta", "the wrong input", _delta_input),
    _of("load delta", "A rolled", _roll_delta),
    _of("deltas", "all rows take the first row's", _select_first_row),
    _of("deltas", "the two deltas swapped", first("_deltas_b", lambda b: b.flip(0))),
    _of("cast", "a row zeroed", _cast_row),
]  # fmt: skip

PLANTS = [*EXACT, *(_of(kind, name, fault) for kind in ENDS for name, fault in COMMON.items()), *OWN]
