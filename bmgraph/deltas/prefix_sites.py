"""Attentions that take a prefix: which keys and values of a graph it goes in front of, and the rewrite that puts it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.structure.sites import Attention
from bmgraph.analysis.structure.value_origins import Core, walk
from bmgraph.analysis.token_values import (
    SEQUENCE_AXIS,
    TokenValues,
    between,
    is_size,
    narrowest,
    token_values,
    widening_chain,
)
from bmgraph.deltas.inserted_values import propagate_longer, shorten
from bmgraph.deltas.longer_positions import LongerPositions
from bmgraph.deltas.row_positions import Chosen, RowPositions
from bmgraph.errors import PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ir.shape_inference import dims, expression
from bmgraph.ops.traits import argument, place_of

aten = torch.ops.aten


@dataclass(frozen=True)
class PrefixSite:
    """Keys and values that a prefix goes in front of, and the attentions that read them.

    path: of the module; several sites of one module, which a model runs again and again, get numbers behind it. keys [B, H, S, D]
    and values [B, H, S, E]: with as many heads as the model computes, before they are repeated for groups of queries.
    """

    path: str
    site: str
    keys: fx.Node
    values: fx.Node
    cores: tuple[Core, ...]

    @property
    def heads(self) -> int:
        """H."""
        return int(self.keys.meta["val"].shape[1])

    @property
    def sizes(self) -> tuple[int, int]:
        """D and E."""
        return int(self.keys.meta["val"].shape[3]), int(self.values.meta["val"].shape[3])


@dataclass(frozen=True)
class Refusal:
    """An attention that takes no prefix, and why."""

    path: str
    why: str


def prefix_sites(program: Program) -> tuple[list[PrefixSite], list[Refusal], dict[str, bool]]:
    """The attentions of a program over one dynamic sequence, in the order of the graph, those that take no prefix, and for each
    path whether its values belong to the sequence that is also read by cross attention's queries (a decoder's)."""
    found: list[PrefixSite] = []
    refused: list[Refusal] = []
    decoders: dict[str, bool] = {}
    cores = {core.node.name: core for core in walk(program.graph).cores}
    views: dict[Any, TokenValues] = {}
    uses = {
        use.node: attention
        for attention in find(program).attentions
        for use in attention.uses
        if use.graph == program.entry
    }
    crossed = {
        expression(cores[node].q.meta["val"].shape[-2]) for node, attention in uses.items() if attention.cross
    }
    paths: dict[str, int] = {}
    for node in program.graph.nodes:
        attention, core = uses.get(node.name), cores.get(node.name)
        if attention is None or core is None:
            continue
        path = _numbered(paths, attention.path or node.name)
        try:
            site = _site(program, path, attention, core, views)
        except PassError as error:
            refused.append(Refusal(path, str(error)))
            continue
        same = next((item for item in found if item.keys is site.keys and item.values is site.values), None)
        if same is not None:
            found[found.index(same)] = PrefixSite(
                same.path, same.site, same.keys, same.values, (*same.cores, core)
            )
            continue
        found.append(site)
        decoders[path] = not crossed or expression(site.keys.meta["val"].shape[SEQUENCE_AXIS]) in crossed
    return found, refused, decoders


def _numbered(paths: dict[str, int], path: str) -> str:
    paths[path] = paths.get(path, 0) + 1
    return path if paths[path] == 1 else f"{path}.{paths[path]}"


def _site(
    program: Program, path: str, attention: Attention, core: Core, views: dict[Any, TokenValues]
) -> PrefixSite:
    if attention.cross:
        raise PassError("it reads another sequence than that of its queries")
    symbol = expression(
        core.k.meta["val"].shape[-2] if core.scores is None else core.scores.meta["val"].shape[-1]
    )
    if not getattr(symbol, "is_Symbol", False):
        raise PassError(
            f"its sequence has {symbol} positions: a prefix needs a dynamic length, which an input has along the tokens"
        )
    if symbol not in views:
        views[symbol] = token_values(program, symbol)
    tokens = views[symbol]
    kept = []
    rows = expression(tokens.source.meta["val"].shape[0])
    for operand in (core.k, core.v):
        chain = widening_chain(operand, lambda node: node in tokens.values)
        kept.append(narrowest(chain, core, rows, tokens.axes))
    _check_mask(core, tokens)
    part = attention.k or attention.v
    return PrefixSite(path, part.linear if part else path, kept[0], kept[1], (core,))


def _check_mask(core: Core, tokens: TokenValues) -> None:
    """Raise PassError where scores get values that are made of tokens, such as biases by content: a prefix has none."""
    read = (
        [core.mask]
        if core.scores is None
        else [item for node in between(core) for item in node.all_input_nodes]
    )
    inside = {core.scores, *(between(core) if core.scores is not None else ())}
    for item in read:
        if (
            isinstance(item, fx.Node)
            and item in tokens.values
            and item not in inside
            and item not in (core.q, core.k)
        ):
            raise PassError(
                "its scores get a bias that is made of tokens, which the keys of a prefix do not have"
            )


Make = Callable[[Editor, PrefixSite, str, fx.Node], fx.Node]
"""Makes the node of the keys or values ("key", "value") [1, H, n, D] of a site, before a node."""


def add_prefix(
    program: Program,
    sites: Sequence[PrefixSite],
    count: int,
    make: Make,
    by: str,
    chosen: Chosen | None = None,
) -> None:
    """Put `count` keys and values in front of those of the sites, and positions for them in front of the text's.

    chosen: rows choose among tables of them [deltas + 1, H, n, D], which `make` makes. Raises PassError where the values of an input at these positions are not known.
    """
    by_sequence: dict[Any, list[PrefixSite]] = {}
    for site in sites:
        by_sequence.setdefault(expression(site.keys.meta["val"].shape[SEQUENCE_AXIS]), []).append(site)
    for symbol, own in by_sequence.items():
        with program.edit(by=by) as editor:
            tokens = token_values(program, symbol)
            _Rewrite(editor, tokens, count, own, chosen).run(make)
            spec = next(spec for spec in program.inputs if spec.name == tokens.source.target)
            shorten(program, str(spec.shape[tokens.axis]), count)
    propagate_longer(program)


class _Rewrite:
    """Puts a prefix in front of the attentions over one sequence."""

    def __init__(
        self,
        editor: Editor,
        tokens: TokenValues,
        count: int,
        sites: Sequence[PrefixSite],
        chosen: Chosen | None,
    ) -> None:
        self._editor, self._tokens, self._count = editor, tokens, count
        self._rows = None if chosen is None else RowPositions(editor, tokens, count, chosen)
        self._positions = self._rows or LongerPositions(editor, tokens, count)
        self._sites = {core.node: site for site in sites for core in site.cores}
        self._cores = {core.node: core for site in sites for core in site.cores}
        self._between = {
            node: core for core in self._cores.values() if core.scores is not None for node in between(core)
        }
        self._joined: dict[tuple[fx.Node, str], fx.Node] = {}

    def run(self, make: Make) -> None:
        """Rewrite all that reads keys, values or positions, in the order of the graph."""
        self._make = make
        first_readers = {
            (core.scores if core.scores is not None else core.node): core for core in self._cores.values()
        }
        for node in list(self._editor.graph.nodes):
            if node not in self._tokens.values or node.op != "call_function" or is_size(node):
                continue
            if node in first_readers:
                self._join(first_readers[node], node)
            if node in self._cores and self._cores[node].scores is None:
                self._mask(node)
            elif node in self._between:
                self._scores(node)
            self._positions_of(node)

    def _positions_of(self, node: fx.Node) -> None:
        """Let a value of tokens read the text's rows of what depends on positions."""
        mask = self._cores[node].mask if node in self._cores else None
        for item in list(node.all_input_nodes):
            if (
                item in self._tokens.values
                or is_size(item)
                or item is mask
                or not self._positions.matters(item)
            ):
                continue
            shape = [expression(size) for size in item.meta["val"].shape]
            if not any(self._tokens.symbol in getattr(size, "free_symbols", ()) for size in shape):
                continue  # counts and places in the text
            if self._tokens.symbol not in shape:
                raise PassError(
                    f"in {node.meta.get('scope') or node.name} positions are flattened with other axes: a prefix cannot be put in "
                    "front of them"
                )
            node.replace_input_with(item, self._positions.of_text(item, node))

    def _join(self, core: Core, reader: fx.Node) -> None:
        """Let an attention read keys and values with the prefix in front."""
        site = self._sites[core.node]
        for operand, kept, which in ((core.k, site.keys, "key"), (core.v, site.values, "value")):
            chain = widening_chain(operand, lambda node: node in self._tokens.values)
            value = self._with_prefix(site, kept, which, reader)
            for node in reversed(chain[: chain.index(kept)]):
                value = self._positions.copied(node, {node.args[0]: value}, reader)  # type: ignore[dict-item]
            end = reader if which == "key" else core.node
            place = core_place(end, operand, which)
            end.update_arg(place, value)

    def _with_prefix(self, site: PrefixSite, kept: fx.Node, which: str, reader: fx.Node) -> fx.Node:
        if (kept, which) not in self._joined:
            own = self._make(self._editor, site, which, reader)
            if self._rows is not None:
                front = self._chosen_of(own, kept, site, self._rows)
            else:
                rows = self._positions.insert(aten.sym_size.int, kept, 0, like=reader)
                front = self._positions.insert(aten.expand.default, own, [rows, -1, -1, -1], like=reader)
            joined = self._positions.insert(aten.cat.default, [front, kept], SEQUENCE_AXIS, like=reader)
            joined.meta["site"] = site.path
            self._joined[kept, which] = joined
        return self._joined[kept, which]

    def _chosen_of(self, table: fx.Node, kept: fx.Node, site: PrefixSite, rows: RowPositions) -> fx.Node:
        """The entries of a table that rows choose, in the type of what they go in front of."""
        front = rows.at_start(aten.index_select.default, table, 0, rows.choice)
        front.meta["site"] = site.path
        dtype = kept.meta["val"].dtype
        return front if table.meta["val"].dtype == dtype else rows.at_start(aten.to.dtype, front, dtype)

    def _mask(self, node: fx.Node) -> None:
        """Let a fused attention hide what it hid, and nothing of the prefix, or what a row does not use of it."""
        core, rows = self._cores[node], self._rows
        hides = rows is None or (core.mask is not None and rows.hides_itself(core.mask))
        if core.mask is not None:
            self._check_keys(node, core.mask)
            node.replace_input_with(core.mask, self._positions.of_text(core.mask, node, keep_last=True))
        if hides and not core.is_causal:
            return
        mask: Any = argument(node, "attn_mask", None)
        if core.is_causal:
            mask = self._positions.causal_mask(node)
        if rows is not None and not hides:
            mask = rows.with_used_alone(mask, node)
        dropout = argument(node, "dropout_p", 0.0)
        node.args = (*node.args[:3], mask, dropout, False, *node.args[6:])
        node.kwargs = {
            name: value
            for name, value in node.kwargs.items()
            if name not in ("attn_mask", "dropout_p", "is_causal")
        }

    def _scores(self, node: fx.Node) -> None:
        """Let a call between written-out scores and probabilities read masks and biases for all keys."""
        core = self._between[node]
        if node is core.softmax and self._rows is not None:
            self._rows.hide_unused(node, [item for call in between(core) for item in call.all_input_nodes])
        for item in list(node.all_input_nodes):
            if item in self._tokens.values:
                continue
            if is_size(item):
                self._size_of_keys(node, item)
            elif item.meta["val"].dim() and self._tokens.symbol in [
                expression(s) for s in item.meta["val"].shape
            ]:
                self._check_keys(node, item)
                node.replace_input_with(item, self._positions.of_text(item, node, keep_last=True))

    def _size_of_keys(self, node: fx.Node, item: fx.Node) -> None:
        """Let the last size of a shape that counts positions count those of the keys."""
        if expression(item.meta["val"]) != self._tokens.symbol:
            return
        for place, given in enumerate(node.args):
            if isinstance(given, (list, tuple)) and given and given[-1] is item:
                node.update_arg(place, [*given[:-1], self._positions.total])

    def _check_keys(self, node: fx.Node, mask: fx.Node) -> None:
        """Raise PassError where the last axis of a mask is not that of keys."""
        size = expression(mask.meta["val"].shape[-1]) if mask.meta["val"].dim() else 1
        if size not in (1, self._tokens.symbol):
            found = list(dims(self._editor.program, mask.meta["val"]))
            raise PassError(
                f"the mask of {node.meta.get('scope') or node.name} is {found}: expected keys of the sequence along its last axis"
            )


def core_place(end: fx.Node, operand: fx.Node, which: str) -> int:
    """The position of keys or values among the arguments of the call that reads them."""
    place = place_of(end.target, which)
    if place is not None and len(end.args) > place and end.args[place] is operand:
        return place
    return next(index for index, item in reversed(list(enumerate(end.args))) if item is operand)


def joins_of(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that put a prefix in front of keys or values, in the order of the graph."""
    return [node for node in graph.nodes if _is_join(node)]


def _is_join(node: fx.Node) -> bool:
    if (
        node.target is not aten.cat.default
        or not has_role(node, NodeRole.PREFIX)
        or node.args[1:] != (SEQUENCE_AXIS,)
    ):
        return False
    parts: Any = node.args[0]
    front: fx.Node = parts[0]
    given: Any = front.args
    return chosen_by(node) or (front.target is aten.expand.default and len(given[1]) == 4)


def chosen_by(join: fx.Node) -> bool:
    """Whether each row chooses what a node puts in front of its keys or values."""
    return _entry(join).target is aten.index_select.default


def _entry(join: fx.Node) -> fx.Node:
    """What a join puts in front, before a cast."""
    parts: Any = join.args[0]
    front: fx.Node = parts[0]
    return front.args[0] if front.target is aten.to.dtype else front  # type: ignore[return-value]


def kept_by(join: fx.Node) -> fx.Node:
    """The keys or values that a prefix goes in front of."""
    parts: Any = join.args[0]
    kept: fx.Node = parts[1]
    return kept


def own_of(join: fx.Node) -> fx.Node:
    """The prefix [1, H, n, D], as it is before it is repeated for each row; a table [deltas + 1, H, n, D] where rows choose."""
    own = _entry(join).args[0]
    assert isinstance(own, fx.Node)
    return own
