"""Soft tokens as a family of deltas: trained embeddings [K, d] of the ids -1 to -K, which stand anywhere in a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.token_values import ids_of
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.family import Delta, DeltaFamily, Part, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.peft_config import SAVED, check_known
from bmgraph.errors import BundleError, MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import KEY, SOFT_TOKENS
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dims

aten = torch.ops.aten

TENSOR = "soft_tokens"
ANYWHERE = "tokens that no vocabulary has, and changes no weight"

Make = Callable[[Editor, fx.Node], fx.Node]
"""Makes the node of the embeddings [K, d] before a node."""


@dataclass(frozen=True)
class SoftPart(Part):
    """The embeddings f[K, d] of a folder."""

    vectors: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self.vectors.numel()


class SoftTokenFamily(DeltaFamily):
    """Trained embeddings of ids below 0."""

    name = "soft_tokens"
    roles = (SOFT_TOKENS,)
    peft_type = "SOFT_TOKENS"

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """One for each lookup of words."""
        return [
            Delta(self, str(node.meta.get("site")), node.args[2], node, ANYWHERE)  # type: ignore[arg-type]
            for node in graph.nodes
            if node.target is aten.where.self and role_is_soft(node)
        ]

    def saved(self, program: Program) -> Saved | None:
        """The embeddings, whatever they are computed from."""
        vectors = vectors_of(program)
        if vectors is None:
            return None
        return Saved(self, {**SAVED, "count": len(vectors)}, {TENSOR: vectors.contiguous()})

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what `saved` wrote."""
        check_known(path, config, {"count"}, self.name)
        value = tensors.pop(TENSOR, None)
        if value is None or value.dim() != 2 or not value.is_floating_point() or not value.numel():
            raise BundleError(
                f"{path} has no embeddings of soft tokens: expected {TENSOR!r} of numbers [K, d]"
            )
        check_values(path, TENSOR, value)
        if config.get("count") != len(value):
            raise BundleError(
                f"{path} has {len(value)} soft tokens, and its configuration says {str(config.get('count'))[:80]}"
            )
        return SoftPart(self, path, {}, {}, value)

    def contents(self, part: Part) -> dict[str, Any]:
        """The embeddings."""
        assert isinstance(part, SoftPart)
        return {TENSOR: part.vectors}

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where the program has embeddings of another width."""
        assert isinstance(part, SoftPart)
        width = int(word_lookups(program)[0].meta["val"].shape[-1])
        if width != part.vectors.shape[1]:
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone: its soft tokens have {part.vectors.shape[1]} features, and the "
                f"program's embeddings {width}"
            )

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Add the embeddings to the lookup of words."""
        assert isinstance(part, SoftPart)
        self.check_fits(program, part)

        def make(editor: Editor, lookup: fx.Node) -> fx.Node:
            value = part.vectors.to(device=program.device, dtype=lookup.meta["val"].dtype)
            return soft_parameter(editor, lookup, value)

        site = add_soft_tokens(program, len(part.vectors), make, by)
        freeze_backbone(program)
        return [Edit(site, f"{len(part.vectors)} soft tokens")]

    def changed(self, program: Program, part: Part) -> Program:
        """A copy whose table has them as its last rows; texts without soft tokens are what they were."""
        return program


def word_lookups(program: Program) -> list[fx.Node]:
    """The lookups of the words of the first input of ids, [B, S, d], in the order of the graph.

    Raises PassError where no input is looked up in one table.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    kinds = {spec.name: spec.kind for spec in program.inputs}
    found: list[tuple[fx.Node, fx.Node]] = []
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    for embedding in find(program).embeddings:
        for use in embedding.uses:
            source = ids_of(nodes[use.node]) if use.graph == program.entry else None
            if (
                isinstance(source, fx.Node)
                and source.op == "placeholder"
                and kinds[str(source.target)] is InputKind.IDS
            ):
                found.append((nodes[use.node], source))
    found.sort(key=lambda pair: order[pair[0]])
    if not found:
        raise PassError(
            "no input of ids is looked up in an embedding: there are no embeddings of tokens to add to"
        )
    source = found[0][1]
    own = [lookup for lookup, ids in found if ids is source]
    tables = {lookup.args[0] for lookup in own}
    if len(tables) > 1:
        names = ", ".join(str(table) for table in tables)
        raise PassError(
            f"the ids of {source.target!r} are looked up in several tables ({names}): which embeddings soft tokens have is not known"
        )
    for lookup in own:
        if lookup.meta["val"].dim() != 3:
            raise PassError(
                f"{lookup.name} returns {list(dims(program, lookup.meta['val']))}: expected [batch, length, d]"
            )
    return own


def add_soft_tokens(program: Program, count: int, make: Make, by: str) -> str:
    """Let the lookup of words give the embedding k for the id -1 - k; returns the name of the table."""
    lookups = word_lookups(program)
    if any(role_is_soft(node) for node in program.graph.nodes):
        raise PassError("the program has soft tokens already")
    source = ids_of(lookups[0])
    site = str(lookups[0].args[0])
    site = next((str(item.target) for item in lookups[0].all_input_nodes if item.op == "get_attr"), site)
    with program.edit(by=by) as editor:

        def call(target: Any, *args: Any) -> fx.Node:
            made = editor.call(target, *args, like=first, part=SOFT_TOKENS)
            made.meta["site"] = site
            return made

        first = lookups[0]
        vectors = make(editor, first)
        soft = call(aten.unsqueeze.default, call(aten.lt.Scalar, source, 0), -1)
        numbers = call(aten.clamp.default, call(aten.bitwise_not.default, source), 0)
        chosen = call(aten.embedding.default, vectors, numbers)
        words = call(aten.clamp.default, source, 0)
        for lookup in lookups:
            indices: Any = lookup.args[1]
            lookup.update_arg(1, [words] if isinstance(indices, (list, tuple)) else words)
            total = editor.call(
                aten.where.self, soft, chosen, lookup, like=lookup, after=lookup, part=SOFT_TOKENS
            )
            total.meta["site"] = site
            lookup.replace_all_uses_with(total, delete_user_cb=lambda user, total=total: user is not total)  # type: ignore[misc]
    return site


def soft_parameter(editor: Editor, lookup: fx.Node, value: torch.Tensor, end: str = "soft_tokens") -> fx.Node:
    """The node that reads a new parameter of soft tokens."""
    table = next(str(item.target) for item in lookup.all_input_nodes if item.op == "get_attr")
    node = editor.parameter(editor.fresh(f"{table}_{end}"), value, like=lookup, part=SOFT_TOKENS)
    node.meta["site"] = table
    return node


def role_is_soft(node: fx.Node) -> bool:
    """Whether a node belongs to soft tokens."""
    return node.meta.get(KEY) == SOFT_TOKENS


def vectors_of(program: Program) -> torch.Tensor | None:
    """The embeddings f[K, d] of a program's soft tokens; None without any."""
    for node in program.graph.nodes:
        if role_is_soft(node) and node.target is aten.embedding.default:
            return evaluate(program, node.args[0])
    return None
