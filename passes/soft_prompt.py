"""SoftPrompt: trained positions in front of those of the text."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.value_origins import base, stem
from bmgraph.deltas.low_rank import freeze_backbone
from bmgraph.deltas.soft_prompt import drop_prompt_positions
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import FORWARD, Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass

aten = torch.ops.aten

LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd"})
"""Operators (scores, labels, weight, reduction, ignore_index) that leave out positions of one label."""

IGNORED = 4
"""The place of `ignore_index` among their arguments."""

DEFAULT_IGNORED = -100


@dataclass(frozen=True, repr=False)
class SoftPrompt(Pass):
    """Put `tokens` trainable embeddings [tokens, d] in front of each row's, and freeze all else.

    They begin as embeddings of words drawn by `seed`. What runs along the sequence grows with them: positions, masks
    (the mask that is an input gets ones for them), token types (as the first token's) and labels (the loss ignores
    them). Outputs are given for the positions of the text alone, so the program's inputs and outputs stay as they were;
    the longest text, where the program knows it, is `tokens` shorter. Encoder-decoders get the prompt in front of what the
    encoder reads.

    Raises PassError where nothing is looked up in an embedding, where the length is fixed, and where it is not known
    what an input or an output holds for inserted positions. Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"prompted"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"prompted"})

    tokens: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: give a number of at least 1")

    def run(self, program: Program, context: Context) -> Program:
        """Insert the prompt behind the tokens' embedding and lengthen what runs beside it."""
        lookup, source = _lookup(program)
        length = _length(program, source)
        fills = _fills(program, source, length)
        _shorten(program, length, self.tokens)
        with program.edit(by=str(self)) as editor:
            site = str(lookup.all_input_nodes[0].target)
            prompt = self._embeddings(program, lookup)
            name = editor.fresh(f"{site}_prompt")
            reader = editor.parameter(name, prompt, like=lookup, part=PROMPT)
            reader.meta["site"] = site
            target: Any = lookup.target
            words = editor.call(target, lookup.args[0], *_index(lookup, source), like=lookup, site=site)
            rows = editor.call(aten.sym_size.int, source, 0, like=lookup, part=PROMPT)
            repeated = editor.call(
                aten.expand.default, reader, [rows, -1, -1], like=lookup, site=site, part=PROMPT
            )
            joined = editor.call(aten.cat.default, [repeated, words], 1, like=lookup, site=site, part=PROMPT)
            editor.replace(lookup, joined)
            for node, fill in fills.items():
                _lengthen(editor, node, fill, self.tokens, {words, rows})
        _propagate(program)
        with program.edit(by=str(self)) as editor:
            _cut_outputs(editor)
        context.edited(site, f"{self.tokens} trained positions in front")
        freeze_backbone(program)
        return program

    def _embeddings(self, program: Program, lookup: fx.Node) -> torch.Tensor:
        """Rows of the table, [1, tokens, d]."""
        table: Any = lookup.args[0]
        count, features = table.meta["val"].shape
        if program.device.type == "meta":
            return torch.empty(1, self.tokens, features, dtype=table.meta["val"].dtype, device="meta")
        chosen = torch.randint(count, (self.tokens,), generator=torch.Generator().manual_seed(self.seed))
        return evaluate(program, table)[chosen.to(program.device)].clone()[None]


def _lookup(program: Program) -> tuple[fx.Node, fx.Node]:
    """Where the words of an input are looked up, and the input: the largest table, its first use."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: list[tuple[int, fx.Node, fx.Node]] = []
    for embedding in find(program).embeddings:
        for use in embedding.uses:
            node = nodes[use.node] if use.graph == FORWARD else None
            source = base(_looked_up(node)) if node is not None else None
            if isinstance(source, fx.Node) and source.op == "placeholder":
                found.append((embedding.rows, nodes[use.node], source))
    if not found:
        raise PassError(
            "no input is looked up in an embedding: there is no row of words to put a prompt before"
        )
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    _, lookup, source = max(found, key=lambda item: (item[0], -order[item[1]]))
    if lookup.meta["val"].dim() != 3 or source.meta["val"].dim() != 2:
        raise PassError(
            f"{lookup.name} gives {list(dims(program, lookup.meta['val']))}: expected [batch, length, d]"
        )
    return lookup, source


def _looked_up(lookup: fx.Node) -> Any:
    """The indices of a lookup, which `index` takes in a list."""
    places = lookup.args[1]
    return places[0] if isinstance(places, (list, tuple)) else places


def _index(lookup: fx.Node, source: fx.Node) -> tuple[Any, ...]:
    """The arguments of a lookup after its table, reading the input itself."""
    if isinstance(lookup.args[1], (list, tuple)):
        return ([source],)
    return (source, *lookup.args[2:])


def _length(program: Program, source: fx.Node) -> str:
    """The name of the length of the input; raises PassError where it is fixed."""
    spec = next(spec for spec in program.inputs if spec.name == source.target)
    length = spec.shape[1]
    if not isinstance(length, str) or not length.isidentifier():
        raise PassError(f"the length of {spec.name!r} is fixed to {length}: nothing can be put before it")
    return length


def _shorten(program: Program, length: str, tokens: int) -> None:
    """The prompt takes its share of the positions that the model has."""
    bounds = program.ranges.get(length)
    if bounds is None or bounds.high is None:
        return
    high, found = bounds.high - tokens, [item.shape[1] for item in _along(program, length)]
    if high < bounds.low or any(size > high for size in found):
        raise PassError(
            f"{tokens} tokens leave {max(0, high)} of the model's {bounds.high} positions, fewer than the example needs "
            f"({max(found, default=bounds.low)}): give fewer tokens"
        )
    program.ranges[length] = replace(bounds, high=high)


def _along(program: Program, length: str) -> list[torch.Tensor]:
    return [
        program.example[spec.name]
        for spec in program.inputs
        if spec.shape[1:2] == (length,) and spec.name in program.example
    ]


def _fills(program: Program, source: fx.Node, length: str) -> dict[fx.Node, float | None]:
    """Inputs that run along the sequence -> what they hold for inserted positions; None: what the first position has."""
    nodes = placeholders(program.graph)
    fills: dict[fx.Node, float | None] = {}
    for spec in program.inputs:
        if length not in spec.shape:
            continue
        node = nodes[spec.name]
        if len(spec.shape) != 2 or spec.shape[1] != length:
            raise PassError(
                f"input {spec} has more than one value a position: what inserted ones have is not known"
            )
        fills[node] = None if node is source else _fill(program, spec, node)
    return fills


def _fill(program: Program, spec: TensorSpec, node: fx.Node) -> float | None:
    """What an input beside the words holds for inserted positions, told from where it goes."""
    example = program.example.get(spec.name)
    reached = _reached(program, node)
    losses = [item for item in reached if stem(item) in LOSSES]
    outputs = {spec.name for spec, value in zip(program.outputs, _returned(program)) if value in reached}
    if losses and outputs <= set(program.losses):
        return float(losses[0].args[IGNORED] if len(losses[0].args) > IGNORED else DEFAULT_IGNORED)  # type: ignore[arg-type]
    if any(stem(user) in ("embedding", "index") for user in reached if base(_looked_up_by(user)) is node):
        counts = torch.arange(example.shape[1]) if example is not None else None
        if example is not None and counts is not None and bool((example.cpu() == counts).all()):
            raise PassError(
                f"input {spec.name!r} numbers the positions: leave it to the model to number them"
            )
        return None
    if example is not None and not bool(((example == 0) | (example == 1)).all()):
        raise PassError(
            f"what input {spec.name!r} holds for inserted positions is not known: it is no mask of 0 and 1"
        )
    return 1.0


def _looked_up_by(user: fx.Node) -> Any:
    return _looked_up(user) if stem(user) in ("embedding", "index") and len(user.args) > 1 else None


def _reached(program: Program, node: fx.Node) -> set[fx.Node]:
    """All that depends on the values of a node; its sizes alone are no values."""
    reached: set[fx.Node] = {node}
    for item in program.graph.nodes:
        if item.target is not aten.sym_size.int and any(other in reached for other in item.all_input_nodes):
            reached.add(item)
    return reached


def _returned(program: Program) -> tuple[fx.Node, ...]:
    values: Any = output_node(program.graph).args[0]
    return tuple(values[: len(program.outputs)])


def _lengthen(editor: Editor, node: fx.Node, fill: float | None, tokens: int, keep: set[fx.Node]) -> None:
    """Let everything but `keep` read the input with inserted positions in front."""
    value: Any = fill if fill is None or node.meta["val"].is_floating_point() else int(fill)

    def call(target: Any, *args: Any) -> fx.Node:
        made = editor.call(target, *args, like=node, after=own[-1], part=PROMPT)
        own.append(made)
        return made

    own = [node]
    column = call(aten.slice.Tensor, node, 1, 0, 1)
    if value is not None:
        column = call(aten.full_like.default, column, value)
    longer = call(aten.cat.default, [call(aten.expand.default, column, [-1, tokens]), node], 1)
    apart = {*own, *keep}
    node.replace_all_uses_with(longer, delete_user_cb=lambda user: user not in apart)


def _propagate(program: Program) -> None:
    """The shapes of the longer sequence; raises PassError where the model does not take them."""
    try:
        propagate(program, everything=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        failed = next(
            (node for node in program.graph.nodes if "val" not in node.meta and node.op != "output"), None
        )
        where = (failed.meta.get("scope") or failed.name) if failed is not None else "the model"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PassError(f"the model has no room for inserted positions in {where}: {first[:200]}") from error


def _cut_outputs(editor: Editor) -> None:
    """Give every output for the positions of the text alone."""
    program = editor.program
    returned = list(_returned(program))
    for place, (spec, node) in enumerate(zip(program.outputs, returned)):
        node = drop_prompt_positions(editor, node)
        if dims(program, node.meta["val"]) != spec.shape:
            found = list(dims(program, node.meta["val"]))
            raise PassError(f"output {spec} became {found}: which of it belongs to the text is not known")
        returned[place] = node
    output = output_node(editor.graph)
    values: Any = output.args[0]
    output.args = ((*returned, *values[len(returned) :]),)
