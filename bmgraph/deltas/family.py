"""The contract of a family of deltas, and the data that passes and families hand each other.

A family is one class in a file of its own: how its deltas look in a graph, what they change, how they are attached, saved,
loaded, merged and chosen by rows. Passes such as `LoadDelta` and `Merge` ask the families and know none of them by name.
`bmgraph.deltas.registry` lists them; a package adds one by an entry point of the group `bmgraph.deltas`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate
from bmgraph.errors import BundleError, PassError
from bmgraph.ir.node_role import role_of
from bmgraph.ir.pass_record import Edit

if TYPE_CHECKING:
    from bmgraph.analysis.weight_sites import Weight
    from bmgraph.deltas.row_tables import RowTable
    from bmgraph.deltas.weighted_sum import Combination
    from bmgraph.ir.editor import Editor
    from bmgraph.ir.program import Program

PREFIX = "base_model.model."
"""Prefix of the tensor names in the files of adapters, as PEFT writes them; the module path follows."""


@dataclass(frozen=True)
class Change:
    """What a delta changes at one module: its tensors and its numbers, by the names that the family gives them."""

    tensors: Mapping[str, torch.Tensor]
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: torch.device) -> Change:
        """The same with floating-point tensors in `dtype`, on `device`."""
        moved = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        return Change(moved, self.numbers)


@dataclass(frozen=True)
class Delta:
    """A delta found on one use of a product.

    `site`: the weight's parameter. `linear`: the product, below all deltas on it. `total`: the node that ends the delta.
    `bound`: what it depends on besides its linear, such as the row; then it has no value of its own and `tensors` is
    empty. `tensors`, `numbers`: the expressions of its tensors and its numbers, as in `Change`. `options`: what does not
    change its outputs, such as dropout.
    """

    family: DeltaFamily
    site: str
    linear: fx.Node
    total: fx.Node
    bound: str = ""
    tensors: Mapping[str, fx.Node] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def change(self, program: Program) -> Change:
        """What it changes, with the values that its tensors have now."""
        return Change({name: evaluate(program, node) for name, node in self.tensors.items()}, self.numbers)

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for deltas that compute the same from the same tensors."""
        return (*self.tensors.values(), *self.numbers.values(), self.family.name)


@dataclass(frozen=True)
class Saved:
    """What a family writes into a folder of deltas: entries of `adapter_config.json`, and tensors by key."""

    family: DeltaFamily
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What a family read from the folder `path`: changes by module path, and what holds for all of them."""

    family: DeltaFamily
    path: Path
    changes: Mapping[str, Change]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the family found nothing."""
        return not self.changes


@dataclass(frozen=True)
class Room:
    """What tables of deltas have room for besides those that are there: a larger rank, more positions in front of a text, and the
    type of their numbers (None: that of the model)."""

    rank: int | None = None
    dtype: torch.dtype | None = None
    tokens: int | None = None


class DeltaFamily(ABC):
    """A kind of delta: an object without state.

    What a family does not say, it cannot do: the methods here refuse it, by the name of the family.
    """

    name: ClassVar[str]
    """Its name, in lower case: in roles of nodes, names of parameters, and messages."""
    roles: ClassVar[tuple[str, ...]]
    """The roles of its nodes (`bmgraph.ir.node_role`), which no other family has; new nodes get the first."""
    table_keys: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """For a family that takes positions, the role of what reads a table of which rows choose -> its key (`RowTable.key`)."""
    peft_type: ClassVar[str] = ""
    """`peft_type` in the configuration of a folder that holds its deltas; empty for a family that is in no folder, or in
    those of others."""
    also_read: ClassVar[tuple[str, ...]] = ()
    """Other types of PEFT whose folders hold what its own hold: how they came to be differs."""
    variant: ClassVar[str] = ""
    """For one of several families with a `peft_type`: the option of the configuration that is true for its deltas."""
    beside: ClassVar[bool] = False
    """Whether it is saved in the folders of other families; `alone` is then the configuration of a folder without them."""
    alone: ClassVar[Mapping[str, Any]] = {}
    faster: ClassVar[tuple[str, ...]] = ()
    """The keys of the tensors that `lr_ratio` lets train at a higher learning rate (LoRA+); empty for a family without them."""
    module_prefix: ClassVar[str] = PREFIX
    """What the names of tensors that train whole begin with in its folders."""
    takes_positions: ClassVar[bool] = False
    """Whether texts must be shorter with its deltas, which have positions of their own."""
    adds: ClassVar[bool] = False
    """Whether a delta adds what does not depend on other deltas of its linear, so that their order does not matter."""

    def tensors(self, program: Program) -> frozenset[str]:
        """The parameters and buffers of a program that belong to its deltas."""
        return frozenset(
            str(node.target)
            for graph in program.graphs.values()
            for node in graph.nodes
            if node.op == "get_attr" and role_of(node) in self.roles
        )

    def contents(self, part: Part) -> dict[str, Any]:
        """What the digest of a folder covers, in any order."""
        return {
            module: [*change.tensors.values(), *change.numbers.values()]
            for module, change in part.changes.items()
        }

    @abstractmethod
    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """Its deltas in a graph, in the order of their totals.

        Raises PassError for nodes that have one of its roles and not its form: they are of no family.
        """

    @abstractmethod
    def saved(self, program: Program) -> Saved | None:
        """What a folder holds of the deltas of a program; None without any. Raises InputError where it cannot hold them."""

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what `saved` or PEFT wrote, and take its tensors out of `tensors`; raises BundleError for what is not valid."""
        raise BundleError(
            f"{path} holds a delta of the family {self.name!r}, which is not loaded from folders: load the whole program "
            "that has it"
        )

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where a loaded delta is of another backbone, as names and shapes tell, before it is put on one."""
        return

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Put loaded deltas on a program and freeze the backbone; returns what changed where.

        `by` is the text of the pass. Raises MisplacedError where a module or a shape is of another backbone.
        """
        raise PassError(
            f"the delta in {part.path} is of the family {self.name!r}, which cannot be put on a program that is there: "
            "load the whole program that has it"
        )

    def changed(self, program: Program, part: Part) -> Program:
        """A copy of a program that computes what it computes with these deltas, by other means than `attach`."""
        raise PassError(
            f"the delta in {part.path} is of the family {self.name!r}, of which nothing else can prove what it computes"
        )

    def combined(
        self, program: Program, parts: Sequence[tuple[str, float, Part]], how: Combination, rank: int | None
    ) -> Part:
        """The weighted sum of loaded deltas, each with its name and weight, as one; see `bmgraph.deltas.weighted_sum`.

        Raises PassError where the family has none.
        """
        name, _, part = parts[0]
        raise PassError(
            f"delta {name!r} in {part.path} is of the family {self.name!r}, of which there is no weighted sum: load it alone with "
            "LoadDelta"
        )

    def attach_rows(
        self,
        editor: Editor,
        selector: fx.Node,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room | None = None,
    ) -> list[Edit]:
        """Put several deltas on a program: row i gets that of number `selector[i]`; numbers without a part change nothing.

        The part of number n is called `names[n - 1]`, "" for one that is to come; `room` is for those. Raises PassError where rows
        cannot choose.
        """
        number, part = next(iter(parts.items()))
        raise PassError(
            f"delta {names[number - 1]!r} in {part.path} is of the family {self.name!r}, of which rows cannot choose: load it "
            "alone with LoadDelta"
        )

    def attach_rows_in_front(
        self,
        program: Program,
        choice: str,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room,
        by: str,
    ) -> list[Edit]:
        """As `attach_rows`, for a family that takes positions: `choice` is the input that chooses, `by` the text of the pass."""
        number, part = next(iter(parts.items()))
        raise PassError(
            f"delta {names[number - 1]!r} in {part.path} is of the family {self.name!r}, of which rows cannot choose: load it "
            "alone with LoadDelta"
        )

    def entries_in_front(
        self, part: Part, tables: Sequence[RowTable], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Name of a table -> the entry that a loaded delta has there, for a family that takes positions.

        Raises PassError where a table has no room for it, MisplacedError where it is of another backbone.
        """
        raise PassError(
            f"the delta in {part.path} is of the family {self.name!r}, which the tables cannot take: load it alone with LoadDelta"
        )

    def why_not_folded(self, program: Program, delta: Delta, weight: Weight) -> str:
        """Why a delta cannot be folded into the weight and bias of its linear; empty where it can."""
        return f"a delta of the family {self.name!r} is no change of a weight: keep it unmerged"

    def folded(
        self, change: Change, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [out, in] and bias [out] with which a linear alone computes what it computes with the delta."""
        raise PassError(f"a delta of the family {self.name!r} is no change of a weight")
