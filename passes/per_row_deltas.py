"""Deltas: several saved deltas in one program, of which each row of a batch chooses one or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from bmgraph.analysis.structure.sites import Linear
from bmgraph.deltas.low_rank import DeltaCalls, delta_input
from bmgraph.deltas.peft_format import Change
from bmgraph.errors import InputError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import DELTA
from bmgraph.ir.program import FORWARD, Program
from bmgraph.ir.shape_inference import dim_text
from bmgraph.pass_manager.context import Context
from bmgraph.pass_manager.pass_base import Effect, Pass
from bmgraph.passes.adapter_matching import fit, given_adapter

aten = torch.ops.aten


@dataclass(frozen=True, repr=False)
class Deltas(Pass):
    """Put saved deltas side by side, `Deltas(("trec", "spam"))` with `resources={"trec": "trec/", "spam": "spam/"}`.

    The program gains an input `delta: int64[batch]`: row i is computed with delta number `delta[i]`, 0 with none. It is
    given by names, `program(**batch, delta=["trec", None])`, by one name for all rows, by numbers, or left out.

    At each linear the factors stand stacked, A [n + 1, in, r] and B [n + 1, r, out] with the scale in B, smaller ranks
    and those without a change at that linear padded with zeros; a row's own are gathered, and two batched products
    add what they change. All of them are frozen.

    Raises what `LoadDelta` raises, and PassError for a linear whose input has no row for each row of the batch.
    """

    effect: ClassVar[Effect] = "intended"
    provides: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"delta-per-row"})

    names: tuple[str, ...] = ()
    input: str = "delta"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names or len(set(self.names)) != len(self.names):
            raise InputError(
                f"names={self.names!r}: give the name of each delta once, Deltas(('one', 'other'))"
            )

    @property
    def resources(self) -> tuple[str, ...]:
        """The folder of each adapter, under its name."""
        return self.names

    def run(self, program: Program, context: Context) -> Program:
        """Add the input, and at each linear that one of the adapters changes the stacked factors."""
        linears: dict[str, Linear] = {}
        changes: dict[str, dict[int, Change]] = {}
        for number, name in enumerate(self.names, 1):
            adapter = given_adapter(context, name)
            for module, linear in fit(program, adapter).items():
                linears[linear.name] = linear
                changes.setdefault(linear.name, {})[number] = adapter.changes[module]
        with program.edit(by=str(self)) as editor:
            nodes = {node.name: node for node in editor.graph.nodes}
            choice = _input(editor, self.input, self.names)
            for site, linear in linears.items():
                a, b = _stacked(changes[site], len(self.names))
                uses = [nodes[use.node] for use in linear.uses if use.graph == FORWARD]
                _attach(editor, site, uses, choice, a, b)
                chosen = ", ".join(self.names[number - 1] for number in changes[site])
                context.edited(site, f"rank {a.shape[2]}: {chosen}")
        return program


def _input(editor: Editor, name: str, names: tuple[str, ...]) -> fx.Node:
    """The input that chooses; in the example the rows take all deltas, and none, in turn."""
    first = next(node for node in editor.graph.nodes if node.op == "placeholder")
    rows = first.meta["val"].shape[0]
    example = editor.program.example.get(str(first.target))
    count = 2 if example is None else len(example)
    turns = torch.arange(count, device=editor.program.device) % (len(names) + 1)
    return editor.input(name, turns, (rows,), names)


def _stacked(changes: Mapping[int, Change], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [count + 1, in, r] and B [count + 1, r, out] of one linear, zero where there is nothing."""
    first = next(iter(changes.values()))
    rank = max(change.a.shape[0] for change in changes.values())
    a = torch.zeros(count + 1, first.a.shape[1], rank)
    b = torch.zeros(count + 1, rank, first.b.shape[0])
    for number, change in changes.items():
        own = change.a.shape[0]
        a[number, :, :own] = change.a.T
        b[number, :own] = change.b.T * change.scale
    return a, b


def _attach(
    editor: Editor, site: str, uses: Sequence[fx.Node], choice: fx.Node, a: torch.Tensor, b: torch.Tensor
) -> None:
    """Add what each row's own factors change to every use of a linear."""
    program = editor.program
    like = {"device": program.device, "dtype": uses[0].meta["val"].dtype}
    readers = [
        editor.parameter(editor.fresh(f"{site}_deltas_{letter}"), stacked.to(**like), frozen=True, part=DELTA)
        for letter, stacked in (("a", a), ("b", b))
    ]
    for reader in readers:
        reader.meta["site"] = site
    for linear in uses:
        _attach_one(editor, site, linear, choice, readers)


def _attach_one(
    editor: Editor, site: str, linear: fx.Node, choice: fx.Node, factors: Sequence[fx.Node]
) -> None:
    x = delta_input(linear)
    sizes = x.meta["val"].shape
    rows, wanted = (dim_text(editor.program, size) for size in (sizes[0], choice.meta["val"].shape[0]))
    if len(sizes) < 2 or rows != wanted:
        raise PassError(
            f"{site} takes {rows} rows where the batch has {wanted}: rows cannot choose their deltas there; merge one "
            "delta, or leave that linear out of them"
        )
    call = DeltaCalls(editor, linear, site)
    own = [call(aten.index_select.default, factor, 0, choice) for factor in factors]
    for _ in range(len(sizes) - 3):
        own = [call(aten.unsqueeze.default, factor, 1) for factor in own]
    if len(sizes) == 2:
        x = call(aten.unsqueeze.default, x, 1)
    change = call(aten.matmul.default, call(aten.matmul.default, x, own[0]), own[1])
    call.add(call(aten.squeeze.dim, change, 1) if len(sizes) == 2 else change)
