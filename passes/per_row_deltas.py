"""Deltas: serve several saved deltas in one program; each row of the batch selects one, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.deltas.family import DeltaFamily, Part, Room
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, ModelPass
from bmgraph.passes.adapter_matching import check_backbone, is_backbone_of, load_adapter, with_adapter
from bmgraph.verify.proof import Proof

SLACK = 10
"""How much more than rounding a delta may differ from a changed weight: its sums have another order."""

HALF_SLACK = 2**13
"""How much coarser fp16 rounds than fp32."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
"""Types of the numbers in tables, by option `dtype`."""

MOST_DELTAS = 2**16
"""The largest capacity."""


@dataclass(frozen=True, repr=False)
class Deltas(ModelPass):
    """Attach several saved deltas: `Deltas(("trec", "spam"))` with `resources={"trec": "trec/", "spam": "spam/"}`.

    The program gets an input `delta: int64[batch]`: row i uses delta number `delta[i]`, counted from 1; 0 is none.
    Callers give names, `program(**batch, delta=["trec", None])`, one name for all rows, numbers, or leave it out (no
    delta).

    At each linear the n deltas are stacked, with entries that change nothing for no delta and for those that are not on
    it; each row gathers its own. Of LoRA these are A [n + 1, in, r] and B [n + 1, r, out], with zeros for smaller ranks and the
    scale multiplied into B; two batched matmuls compute the change. All deltas are frozen.

    capacity: how many deltas the tables have room for, those that are named included (by default just these). An engine owns
    the tables: `engine.deltas.add(name, folder)`, `remove` and `swap` write an entry while it runs, without compiling anything
    again; the linears that later deltas change are those that one of the named ones changes. rank: the largest rank that later
    ones may have, by default the largest of the named ones. dtype: "fp32" or "fp16", the type of the numbers in the tables, by
    default that of their linears; what rows choose is computed in the type of the linear.

    Soft prompts and prefixes may be of different lengths (tokens: the most that later ones may have, by default the most of the
    named ones): a row has its own in front of its text and nothing else, so that it is what its prompt alone gives, with room
    behind it that a mask hides. A table of ones says which entries a delta uses. The model needs a mask where it is not causal, and
    for a KV cache, in front of which the keys and values of each row then are.

    Raises what `LoadDelta` raises, and PassError for deltas of which some are prompts and others prefixes, for a linear whose input does not have one row per row of the batch and
    for a family of deltas of which rows cannot choose.
    """

    effect: ClassVar[Effect] = "intended"
    changes: ClassVar[frozenset[str]] = frozenset({"ranges"})
    provides: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})

    names: tuple[str, ...] = ()
    input: str = "delta"
    capacity: int | None = None
    rank: int | None = None
    dtype: str | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError(
                f"names={self.names!r}: give the name of each delta once, Deltas(('one', 'other'))"
            )

        if self.capacity is not None and not len(self.names) <= self.capacity <= MOST_DELTAS:
            raise InputError(
                f"capacity={self.capacity}: give a number from {len(self.names)}, that of the names, to {MOST_DELTAS}"
            )
        if self.rank is not None and self.rank < 1:
            raise InputError(f"rank={self.rank}: give a rank of at least 1")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: give a number of at least 1")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}")

    @property
    def resources(self) -> tuple[str, ...]:
        """The adapter folders, by the names of the deltas."""
        return self.names

    def fits(self, program: Program, context: Context) -> bool:
        """Whether all adapters were trained on the program."""
        return is_backbone_of(program, [load_adapter(context, name) for name in self.names])

    def run(self, program: Program, context: Context) -> Program:
        """Add the input, and let each family stack its deltas at each linear that they change."""
        parts: dict[DeltaFamily, dict[int, Part]] = {}
        for number, name in enumerate(self.names, 1):
            adapter = load_adapter(context, name)
            check_backbone(program, adapter)
            for part in adapter.parts:
                if part.family.beside and not part.family.contents(part):
                    continue  # the folder holds nothing of a family that is saved beside others
                parts.setdefault(part.family, {})[number] = part
        names = (*self.names, *[""] * ((self.capacity or 0) - len(self.names)))
        in_front = [family for family in parts if family.takes_positions]
        if len(in_front) > 1:
            kinds = " and ".join(family.name for family in in_front)
            raise PassError(
                f"the deltas are of the families {kinds}, which both take the positions in front of a text: let rows choose among one of "
                "them"
            )
        with program.edit(by=str(self)) as editor:
            selector = _selector(editor, self.input, self.names)
            for family, by_number in parts.items():
                if family not in in_front:
                    self._note(context, family.attach_rows(editor, selector, by_number, names, *self._room))
        for family in in_front:
            room = next(iter(self._room), Room())
            self._note(
                context,
                family.attach_rows_in_front(program, self.input, parts[family], names, room, str(self)),
            )
        return program

    @property
    def _room(self) -> tuple[Room, ...]:
        """The room of tables, where an option says it."""
        plain = self.rank is None and self.dtype is None and self.tokens is None
        return () if plain else (Room(self.rank, DTYPES.get(self.dtype or ""), self.tokens),)

    @staticmethod
    def _note(context: Context, edits: list[Edit]) -> None:
        for edit in edits:
            context.edited(edit.site, edit.what, edit.tensors)

    def prove(self, before: Program, after: Program, proof: Proof, context: Context) -> None:
        """Rows that all choose one delta must be what that delta alone gives, and mixed rows what each of them gives."""
        rounded = SLACK * (HALF_SLACK if self.dtype == "fp16" else 1)
        adapters = [load_adapter(context, name) for name in self.names]
        if any(part.family.takes_positions for adapter in adapters for part in adapter.parts):
            proof = proof.fitting(after)  # texts may have to be shorter
        proof.same(before, after, "rows that choose no delta are changed", SLACK, {self.input: 0})
        for number, (name, adapter) in enumerate(zip(self.names, adapters), 1):
            expected = with_adapter(before, adapter)
            what = f"rows that choose {name!r} are not what it gives"
            proof.same(expected, after, what, rounded, {self.input: number})
        proof.same_rows(after, self.input, len(self.names) + 1, "a row depends on what others choose", SLACK)


def _selector(editor: Editor, name: str, names: tuple[str, ...]) -> fx.Node:
    """Add the input that selects a delta for each row; in the example the rows cycle through none and all deltas."""
    first = next(node for node in editor.graph.nodes if node.op == "placeholder")
    rows = first.meta["val"].shape[0]
    example = editor.program.example.get(str(first.target))
    count = 2 if example is None else len(example)
    selected = torch.arange(count, device=editor.program.device) % (len(names) + 1)
    return editor.input(name, selected, (rows,), names, InputKind.CHOICE)
