"""Prefixes as a family of deltas: trained keys and values in front of those of attentions (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.token_values import SEQUENCE_AXIS
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.family import Delta, DeltaFamily, Part, Room, Saved
from bmgraph.deltas.prefix_format import ENDS, prefix_config, read_prefixes
from bmgraph.deltas.prefix_sites import (
    PrefixSite,
    add_prefix,
    chosen_by,
    joins_of,
    kept_by,
    own_of,
    prefix_sites,
)
from bmgraph.deltas.row_positions import Chosen
from bmgraph.deltas.rows_in_front import (
    check_not_of_rows,
    described,
    entry_in_front,
    in_type,
    room_in_front,
    used_positions,
)
from bmgraph.errors import MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.matching import END
from bmgraph.ir.node_role import NodeRole, delta_role, has_role, role_of
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program, tensor_nodes
from bmgraph.ir.shape_inference import dims, expression, propagate
from bmgraph.lowering.to_exported_program import trim

if TYPE_CHECKING:
    from bmgraph.deltas.row_tables import RowTable

aten = torch.ops.aten

ROLE = delta_role("prefix")
KEYS, VALUES, USED = (delta_role(f"prefix_{end}") for end in ("keys", "values", "used"))
"""Roles of what reads tables of which rows choose: keys, values, and which positions a delta uses."""
MOVES = (aten.select.int, aten.expand.default, aten.permute.default, aten.unsqueeze.default)
"""What moves axes where positions are taken at the places of each row's text."""
CHANGES = "keys and values in front of those of the text, and changes no weight"

Prefixes = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Path of a site -> keys f[n, H, D] and values f[n, H, E], in the order of the graph."""


@dataclass(frozen=True)
class PrefixPart(Part):
    """Keys and values of a folder: by path, or in the order of the attentions of a model (PEFT)."""

    by_path: Prefixes = field(default_factory=dict)
    in_order: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is no prefix."""
        return not self.by_path and not self.in_order


class PrefixFamily(DeltaFamily):
    """Trained keys and values in front of those of attentions."""

    name = "prefix"
    roles = (ROLE, KEYS, VALUES, USED)
    table_keys = MappingProxyType({KEYS: "prefix_key", VALUES: "prefix_value", USED: "used"})
    peft_type = "PREFIX_TUNING"
    module_prefix = "base_model."
    takes_positions = True

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """One delta for the keys and one for the values of each site."""
        return [
            Delta(self, str(join.meta.get("site")), kept_by(join), join, CHANGES) for join in joins_of(graph)
        ]

    def saved(self, program: Program) -> Saved | None:
        """What the prefix is, whatever it is computed from: in PEFT's form where that has it."""
        check_not_of_rows(program, self)
        prefixes = prefixes_of(program)
        if not prefixes:
            return None
        in_order = default_sites(without_prefix(program)[0]) == list(prefixes)
        config, tensors = prefix_config(prefixes, in_order, _peft_task(program))
        return Saved(self, config, tensors)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what PEFT or `saved` wrote."""
        by_path, in_order = read_prefixes(path, config, tensors)
        return PrefixPart(self, path, {}, {}, by_path, in_order)

    def contents(self, part: Part) -> dict[str, Any]:
        """All keys and values."""
        assert isinstance(part, PrefixPart)
        return {
            **{name: list(pair) for name, pair in part.by_path.items()},
            "prompt_embeddings": [value for pair in part.in_order for value in pair],
        }

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where the program has other attentions than the prefix."""
        _placed(program, part)

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Put the keys and values in front of those of the attentions."""
        placed = _placed(program, part)
        if prefixes_of(program):
            raise PassError("the program has a prefix already: load one on a program without")
        count = next(len(pair[0]) for pair in placed.values())
        sites = [site for site in prefix_sites(program)[0] if site.path in placed]
        add_prefix(program, sites, count, plain_values(placed), by)
        freeze_backbone(program)
        return [Edit(site.path, f"{count} keys and values in front") for site in sites]

    def attach_rows_in_front(
        self,
        program: Program,
        choice: str,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room,
        by: str,
    ) -> list[Edit]:
        """Put in front of each attention the keys and values of each row's number, of which later ones may have `room.tokens`."""
        if prefixes_of(program):
            raise PassError(
                "the program has a prefix already: rows choose among prefixes on a program without"
            )
        placed = {number: _placed(program, part) for number, part in parts.items()}
        counts = {number: len(next(iter(own.values()))[0]) for number, own in placed.items()}
        tokens = room_in_front(counts, names, room)
        sites = [
            site for site in prefix_sites(program)[0] if any(site.path in own for own in placed.values())
        ]
        used = used_positions(counts, len(names), tokens, last=True).to(program.device)

        def make(editor: Editor, site: PrefixSite, which: str, before: fx.Node) -> fx.Node:
            value = which == "value"
            dtype = room.dtype or (site.values if value else site.keys).meta["val"].dtype
            table = torch.zeros(len(names) + 1, site.heads, tokens, site.sizes[value], dtype=dtype)
            for number, own in placed.items():
                if site.path in own:
                    entry = in_type(own[site.path][value], dtype, parts[number]).permute(1, 0, 2)
                    table[number, :, tokens - counts[number] :] = entry
            name = editor.fresh(f"{site.path}_deltas_prefix_{which}")
            role = VALUES if value else KEYS
            return editor.parameter(name, table.to(program.device), frozen=True, part=role)

        for number, own in placed.items():
            left = [site.path for site in sites if site.path not in own]
            if left:
                raise PassError(
                    f"delta {names[number - 1]!r} has no prefix at {left[0]}, where others have one: let rows choose among prefixes of the "
                    "same attentions"
                )
        add_prefix(program, sites, tokens, make, by, Chosen(choice, used, USED))
        size = sum(
            program.tensor(str(node.target)).nbytes
            for node in tensor_nodes(program.graph).values()
            if role_of(node) in self.table_keys
        )
        what = described(counts, names, tokens, size)
        return [Edit(site.path, what) for site in sites]

    def entries_in_front(
        self, part: Part, tables: Sequence[RowTable], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The keys and values of each attention, and that the last positions are used."""
        assert isinstance(part, PrefixPart)
        own = [item for item in tables if item.family == self.name]
        paths = list(dict.fromkeys(item.modules[0] for item in own if item.key in ENDS))
        placed = dict(part.by_path)
        if part.in_order and len(part.in_order) == len(paths):
            placed = dict(zip(paths, part.in_order))
        if set(placed) != set(paths):
            raise MisplacedError(
                f"the delta in {part.path} has a prefix of {len(placed) or len(part.in_order)} attentions, and the tables are of "
                f"{len(paths)} ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''}): it must have one of each of these"
            )
        count = next(len(pair[0]) for pair in placed.values())
        entries = {}
        for item in own:
            if item.key in ENDS:
                value, axis = placed[item.modules[0]][item.key == ENDS[1]].permute(1, 0, 2), 1
            else:
                value, axis = torch.ones(count), 0
            entries[item.name] = entry_in_front(value, tensors[item.name], axis, True, part)
        return entries

    def changed(self, program: Program, part: Part) -> Program:
        """A copy with the same keys and values; what a prefix does is proved where `Prefix` adds one."""
        copy = program.clone()
        self.attach(copy, part, "")
        return copy


def plain_values(prefixes: Prefixes) -> Any:
    """What makes the nodes of keys and values that are parameters."""

    def make(editor: Editor, site: PrefixSite, which: str, before: fx.Node) -> fx.Node:
        kept = site.keys if which == "key" else site.values
        value = prefixes[site.path][which == "value"].permute(1, 0, 2)[None].contiguous()
        value = value.to(device=editor.program.device, dtype=kept.meta["val"].dtype)
        return prefix_parameter(editor, site, f"prefix_{which}", value)

    return make


def prefix_parameter(editor: Editor, site: PrefixSite, end: str, value: torch.Tensor) -> fx.Node:
    """The node that reads a new parameter of a site's prefix."""
    name = editor.fresh(f"{site.path}.{end}")
    node = editor.parameter(name, value, like=site.keys, part=ROLE)
    node.meta["site"] = site.site
    return node


def default_sites(program: Program) -> list[str]:
    """The attentions that get a prefix where none are chosen: those of the decoder, or all where there is no cross attention."""
    sites, _, decoders = prefix_sites(program)
    return [site.path for site in sites if decoders[site.path]]


def prefixes_of(program: Program) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path -> the keys f[n, H, D] and values f[n, H, E] of a program's prefix, in the order of the graph; empty without one."""
    found: dict[str, list[torch.Tensor]] = {}
    for join in joins_of(program.graph):
        value = evaluate(program, own_of(join))[0].permute(1, 0, 2)
        found.setdefault(str(join.meta["site"]), []).append(value)
    return {path: (pair[0], pair[1]) for path, pair in found.items()}


def prefixed_inputs(program: Program) -> list[str]:
    """The inputs along sequences whose attentions have a prefix: one for each sequence."""
    joins = joins_of(program.graph)
    lengths = {str(dims(program, kept_by(join).meta["val"])[SEQUENCE_AXIS]) for join in joins}
    kinds = (InputKind.IDS, InputKind.FEATURES)
    named: dict[str, str] = {}
    for spec in sorted(program.inputs, key=lambda spec: spec.kind not in kinds):
        for length in lengths.intersection(str(dim) for dim in spec.shape):
            named.setdefault(length, spec.name)
    return list(named.values())


@dataclass(frozen=True)
class RowChoice:
    """How rows choose prefixes: the input, which positions each delta uses f[deltas + 1, n], and the path of the attention by the name
    of the node of its keys, or values."""

    choice: str
    used: torch.Tensor
    paths: Mapping[str, str]


def row_choice(program: Program, source: str) -> RowChoice | None:
    """How rows choose the prefixes of the sequence of an input; None where they do not."""
    joins = [join for join in joins_of(program.graph) if chosen_by(join)]
    for reader in tensor_nodes(program.graph).values() if joins else ():
        if role_of(reader) != USED or reader.meta.get("site") != source:
            continue
        (gather,) = reader.users
        choice: Any = gather.args[2]
        used = program.tensor(str(reader.target))
        return RowChoice(
            str(choice.target), used, {kept_by(join).name: str(join.meta["site"]) for join in joins}
        )
    return None


def without_prefix(program: Program, source: str | None = None) -> tuple[Program, dict[str, torch.Tensor]]:
    """A copy of the program without its prefix, of the sequence of the input `source` alone if one is given, and the keys and
    values [1, H, n, D] by the name of the node that they were in front of. Names of nodes stay."""
    bare = program.clone()
    values: dict[str, torch.Tensor] = {}
    lengths: dict[str, int] = {}
    symbols: set[Any] = set()
    given = None if source is None else next(spec.shape for spec in program.inputs if spec.name == source)
    for join in joins_of(bare.graph):
        kept = kept_by(join)
        length = str(dims(bare, kept.meta["val"])[SEQUENCE_AXIS])
        if given is not None and length not in given:
            continue
        values[kept.name] = evaluate(bare, own_of(join))
        lengths[length] = int(values[kept.name].shape[SEQUENCE_AXIS])
        symbols.add(expression(kept.meta["val"].shape[SEQUENCE_AXIS]))
        join.replace_all_uses_with(kept)
    if not values:
        return program, {}
    for node in list(bare.graph.nodes):
        if has_role(node, NodeRole.PREFIX) and node.target is aten.index.Tensor:
            _undo_places(node)
            continue
        text = _text_of(node, set(lengths.values())) if has_role(node, NodeRole.PREFIX) else None
        if text is not None and symbols & _symbols(text):
            node.replace_all_uses_with(text)
    for length, count in lengths.items():
        bounds = bare.ranges.get(length)
        if bounds is not None and bounds.high is not None:
            bare.ranges = {**bare.ranges, length: replace(bounds, high=bounds.high + count)}
    trim(bare)
    propagate(bare, everything=True)
    return bare, values


def _undo_places(node: fx.Node) -> None:
    """Let tokens read a value of positions as it is, in place of what was taken at the places of each row's text."""
    value: Any = node.args[0]
    while has_role(value, NodeRole.PREFIX) and value.target in MOVES:
        value = value.args[0]
    end = node
    while len(end.users) == 1 and (user := next(iter(end.users))).target in MOVES:
        if not has_role(user, NodeRole.PREFIX):
            break
        end = user
    end.replace_all_uses_with(value)


def _text_of(node: fx.Node, counts: set[int]) -> Any:
    """What holds the text's positions, or also all others, where a node joins, counts or cuts them; None for another node."""
    kept: Any = None
    if node.target is aten.cat.default:
        kept = node.args[0][-1]  # type: ignore[index]
    elif node.target in (operator.add, aten.add.Tensor) or (
        node.target is aten.slice.Tensor and node.args[2] in counts and node.args[3] == END
    ):
        kept = node.args[0]
    return kept


def _symbols(node: fx.Node) -> set[Any]:
    """The names of sizes that a size, or the shape of a value, depends on."""
    value = node.meta["val"]
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    return {symbol for size in sizes for symbol in getattr(expression(size), "free_symbols", ())}


def _placed(program: Program, part: Part) -> Prefixes:
    """The keys and values of a folder by the attentions of a program; raises MisplacedError where they do not fit."""
    assert isinstance(part, PrefixPart)
    sites = {site.path: site for site in prefix_sites(program)[0]}
    placed = dict(part.by_path)
    if part.in_order:
        chosen = default_sites(program)
        if len(chosen) != len(part.in_order):
            raise MisplacedError(
                f"the delta in {part.path} has a prefix of {len(part.in_order)} layers, and the program {len(chosen)} attentions that "
                "take one: load it on the model that it was trained on"
            )
        placed = dict(zip(chosen, part.in_order))
    for path, (keys, values) in placed.items():
        site = sites.get(path)
        if site is None:
            raise MisplacedError(
                f"the delta in {part.path} has a prefix of {path!r}, which is no attention of the program that takes one"
            )
        found = tuple(keys.shape[1:]), tuple(values.shape[1:])
        wanted = tuple((site.heads, size) for size in site.sizes)
        if found != wanted:
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone: its prefix of {path} has keys and values of {found[0]} and "
                f"{found[1]} heads and features, the program's have {wanted[0]} and {wanted[1]}"
            )
    return placed


def _peft_task(program: Program) -> tuple[str | None, bool]:
    """PEFT's type of task as far as it is known, and whether the model is an encoder-decoder."""
    found = find(program).attentions
    if any(attention.cross for attention in found):
        return "SEQ_2_SEQ_LM", True
    causal = bool(found) and all(attention.causal for attention in found)
    return ("CAUSAL_LM" if causal else None), False
