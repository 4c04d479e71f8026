"""SoftPrompt: prepend trainable embeddings to the token embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.value_origins import base
from bmgraph.deltas.backbone import check_backbone_frozen, freeze_backbone
from bmgraph.deltas.inserted_values import inserted_value, looked_up, ordinary_id, returned_by
from bmgraph.deltas.soft_prompt import drop_prompt_positions
from bmgraph.errors import InputError, PassError, VerificationError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import PROMPT
from bmgraph.ir.program import Program, output_node, placeholders
from bmgraph.ir.shape_inference import dims, propagate
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.verify.proof import Proof
from bmgraph.verify.reference_outputs import Batch

aten = torch.ops.aten

SLACK = 10
"""How much more than rounding the outputs may differ in the proof: sums over more positions have another order."""


@dataclass(frozen=True, repr=False)
class SoftPrompt(ModelPass):
    """Prepend `tokens` trainable embeddings [tokens, d] to each row of token embeddings, and freeze everything else.

    They start as the embeddings of random tokens, drawn with `seed`. Everything along the sequence grows with them:
    positions, masks (a mask input is extended with ones), token types (with the first token's type) and labels (with the
    label that the loss ignores). What the model computes from the ids themselves, such as which are padding, sees an id
    that the model treats as any other. Outputs cover only the positions of the text, so the inputs and outputs of the program
    keep their shapes; the maximum text length, where it is known, shrinks by `tokens`. In an encoder-decoder the prompt
    goes in front of the encoder's input.

    Raises PassError where no input is looked up in an embedding, the sequence length is fixed, or the values of an input
    or output at the inserted positions cannot be determined. Source: Lester et al. 2021 (arXiv:2104.08691).
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"frozen", "ranges"})
    provides: ClassVar[frozenset[str]] = frozenset({"prompted"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"prompted"})

    tokens: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: give a number of at least 1")

    def run(self, program: Program, context: Context) -> Program:
        """Insert the prompt after the token embedding and extend the other inputs along the sequence."""
        lookup, source = _lookup(program)
        length = _length(program, source)
        fills = _fills(program, lookup, source, length)
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
                _extend(editor, node, fill, self.tokens, {words, rows})
        _propagate(program)
        with program.edit(by=str(self)) as editor:
            _trim_outputs(editor)
        context.edited(site, f"{self.tokens} trainable positions prepended")
        freeze_backbone(program)
        return program

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """It must compute what the program computes with the tokens in front whose embeddings the prompt starts as."""
        check_backbone_frozen(after)
        lookup, source = _lookup(before)
        if {user for user in source.users if user.target is not aten.sym_size.int} != {lookup}:
            return  # what else the model computes from ids is not that of the prompt's tokens
        length = _length(before, source)
        fills = _fills(before, lookup, source, length)
        words = _words(before, after, lookup)

        def longer(batch: Batch) -> dict[str, torch.Tensor]:
            return {
                name: _longer(batch[name], words, fills, node, source)
                for name, node in placeholders(before.graph).items()
            }

        def text(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for spec in before.outputs:
                for axis, dim in enumerate(spec.shape):
                    if dim == length:
                        outputs[spec.name] = outputs[spec.name].narrow(
                            axis, len(words), outputs[spec.name].shape[axis] - len(words)
                        )
            return outputs

        proof.same_values(
            before, after, longer, text, "it is not the program with the prompt's tokens in front", SLACK
        )

    def _embeddings(self, program: Program, lookup: fx.Node) -> torch.Tensor:
        """Initial values: random rows of the embedding table, [1, tokens, d]."""
        table: Any = lookup.args[0]
        count, features = table.meta["val"].shape
        if program.device.type == "meta":
            return torch.empty(1, self.tokens, features, dtype=table.meta["val"].dtype, device="meta")
        chosen = torch.randint(count, (self.tokens,), generator=torch.Generator().manual_seed(self.seed))
        return evaluate(program, table)[chosen.to(program.device)].clone()[None]


def _words(before: Program, after: Program, lookup: fx.Node) -> torch.Tensor:
    """The ids i64[tokens] whose embeddings the prompt starts as."""
    (name,) = set(after.parameters) - set(before.parameters)
    table = evaluate(before, lookup.args[0])  # type: ignore[arg-type]
    found = []
    for row in after.parameters[name][0]:
        equal = (table == row).all(-1)
        if not bool(equal.any()):
            raise VerificationError("the prompt does not start as embeddings of tokens")
        found.append(int(equal.int().argmax()))
    return torch.tensor(found, device=table.device)


def _longer(
    value: torch.Tensor,
    words: torch.Tensor,
    fills: dict[fx.Node, float | None],
    node: fx.Node,
    source: fx.Node,
) -> torch.Tensor:
    """An input with the positions of the prompt in front, as the user would write them."""
    if node not in fills:
        return value
    fill = fills[node]
    column = value[:, :1] if fill is None else torch.full_like(value[:, :1], fill)
    front = column.expand(-1, len(words)) if node is not source else words.to(value).expand(len(value), -1)
    return torch.cat([front, value], 1)


def _lookup(program: Program) -> tuple[fx.Node, fx.Node]:
    """The token-embedding lookup and the input that it reads: the first use of the largest table."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: list[tuple[int, fx.Node, fx.Node]] = []
    for embedding in find(program).embeddings:
        for use in embedding.uses:
            source = base(looked_up(nodes[use.node]))
            if isinstance(source, fx.Node) and source.op == "placeholder":
                found.append((embedding.rows, nodes[use.node], source))
    if not found:
        raise PassError(
            "no input is looked up in an embedding: there are no token embeddings to prepend a prompt to"
        )
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    _, lookup, source = max(found, key=lambda item: (item[0], -order[item[1]]))
    if lookup.meta["val"].dim() != 3 or source.meta["val"].dim() != 2:
        raise PassError(
            f"{lookup.name} returns {list(dims(program, lookup.meta['val']))}: expected [batch, length, d]"
        )
    return lookup, source


def _index(lookup: fx.Node, source: fx.Node) -> tuple[Any, ...]:
    """The arguments of a lookup after the table, with the input itself as indices."""
    if isinstance(lookup.args[1], (list, tuple)):
        return ([source],)
    return (source, *lookup.args[2:])


def _length(program: Program, source: fx.Node) -> str:
    """The name of the sequence dimension of the input; raises PassError where it is fixed."""
    spec = next(spec for spec in program.inputs if spec.name == source.target)
    length = spec.shape[1]
    if not isinstance(length, str) or not length.isidentifier():
        raise PassError(f"the length of {spec.name!r} is fixed to {length}: a prompt needs a dynamic length")
    return length


def _shorten(program: Program, length: str, tokens: int) -> None:
    """Reduce the maximum length by the prompt; raises PassError where the example would not fit any more."""
    bounds = program.ranges.get(length)
    if bounds is None or bounds.high is None:
        return
    high = bounds.high - tokens
    lengths = [item.shape[1] for item in _examples_along(program, length)]
    if high < bounds.low or any(size > high for size in lengths):
        raise PassError(
            f"{tokens} tokens leave {max(0, high)} of the model's {bounds.high} positions, fewer than the example needs "
            f"({max(lengths, default=bounds.low)}): give fewer tokens"
        )
    program.ranges[length] = replace(bounds, high=high)


def _examples_along(program: Program, length: str) -> list[torch.Tensor]:
    """The example inputs whose second dimension is the sequence."""
    return [
        program.example[spec.name]
        for spec in program.inputs
        if spec.shape[1:2] == (length,) and spec.name in program.example
    ]


def _fills(program: Program, lookup: fx.Node, source: fx.Node, length: str) -> dict[fx.Node, float | None]:
    """Inputs along the sequence -> their value at inserted positions; None repeats the value of the first position.

    Inserted ids are looked up in no embedding of words: their value only says what else the model computes from ids.
    """
    nodes = placeholders(program.graph)
    fills: dict[fx.Node, float | None] = {}
    for spec in program.inputs:
        if length not in spec.shape:
            continue
        node = nodes[spec.name]
        if len(spec.shape) != 2 or spec.shape[1] != length:
            raise PassError(
                f"input {spec} has more than one value per position: its values at inserted positions are not known"
            )
        if node is source:
            table: Any = lookup.args[0]
            fills[node] = ordinary_id(program, source, int(table.meta["val"].shape[0]))
        else:
            fills[node] = inserted_value(program, spec, node)
    return fills


def _extend(editor: Editor, node: fx.Node, fill: float | None, tokens: int, keep: set[fx.Node]) -> None:
    """Let all users of an input, except `keep`, read it with the inserted positions prepended."""
    value: Any = fill if fill is None or node.meta["val"].is_floating_point() else int(fill)

    def call(target: Any, *args: Any) -> fx.Node:
        made = editor.call(target, *args, like=node, after=chain[-1], part=PROMPT)
        chain.append(made)
        return made

    chain = [node]
    column = call(aten.slice.Tensor, node, 1, 0, 1)
    if value is not None:
        column = call(aten.full_like.default, column, value)
    longer = call(aten.cat.default, [call(aten.expand.default, column, [-1, tokens]), node], 1)
    unchanged = {*chain, *keep}
    node.replace_all_uses_with(longer, delete_user_cb=lambda user: user not in unchanged)


def _propagate(program: Program) -> None:
    """Infer all shapes for the longer sequence; raises PassError where an operator does not accept them."""
    try:
        propagate(program, everything=True)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        failed = next(
            (node for node in program.graph.nodes if "val" not in node.meta and node.op != "output"), None
        )
        where = (failed.meta.get("scope") or failed.name) if failed is not None else "the model"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PassError(f"the model does not accept inserted positions in {where}: {first[:200]}") from error


def _trim_outputs(editor: Editor) -> None:
    """Trim every output to the positions of the text."""
    program = editor.program
    returned = list(returned_by(program))
    for index, (spec, node) in enumerate(zip(program.outputs, returned)):
        node = drop_prompt_positions(editor, node)
        if dims(program, node.meta["val"]) != spec.shape:
            found = list(dims(program, node.meta["val"]))
            raise PassError(f"output {spec} became {found}: its positions of the text are not known")
        returned[index] = node
    output = output_node(editor.graph)
    values: Any = output.args[0]
    output.args = ((*returned, *values[len(returned) :]),)
