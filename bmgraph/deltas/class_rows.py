"""Rows of the head for classes as a family of deltas: an output f[B, S, C] beside, or in the place of, the logits of words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.structure.value_origins import products, walk
from bmgraph.deltas.backbone import freeze_backbone
from bmgraph.deltas.family import Delta, DeltaFamily, Part, Room, Saved
from bmgraph.deltas.file_values import check_values
from bmgraph.deltas.low_rank_format import low_rank_config
from bmgraph.errors import BundleError, MisplacedError, PassError
from bmgraph.ir.editor import Editor
from bmgraph.ir.node_role import delta_role, has_role
from bmgraph.ir.pass_record import Edit
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.shape_inference import dims
from bmgraph.ir.tensor_spec import TensorSpec
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten

ROLE = delta_role("class_rows")
OUTPUT = "class_scores"
KEYS = ("class_rows.weight", "class_rows.bias")
OPTION = "class_rows"
"""The entry of a folder's configuration: whether the logits of words stay."""


@dataclass(frozen=True)
class RowsPart(Part):
    """weight f[C, d], bias f[C] or None; keep: whether the logits of words stay an output."""

    weight: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    bias: torch.Tensor | None = None
    keep: bool = False

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return not self.weight.numel()


class ClassRowsFamily(DeltaFamily):
    """A linear from what the head reads to classes, saved beside the deltas of another family."""

    name = "class_rows"
    roles = (ROLE,)
    beside = True
    alone = MappingProxyType({"peft_type": "LORA", **low_rank_config({}, 0.0, False)})

    def recognise(self, graph: fx.Graph) -> list[Delta]:
        """None: it changes no linear of the model."""
        return []

    def saved(self, program: Program) -> Saved | None:
        """The rows and their biases."""
        node = rows_of(program)
        if node is None:
            return None
        tensors = {
            key: program.tensor(str(item.target))
            for key, item in zip(KEYS, node.args[1:])
            if isinstance(item, fx.Node)
        }
        keep = any(
            spec.name != OUTPUT and spec.shape[:-1] == _spec(program).shape[:-1] for spec in program.outputs
        )
        return Saved(self, {OPTION: {"keep": keep}}, tensors)

    def loaded(self, path: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Part:
        """Read what `saved` wrote."""
        weight, bias = (tensors.pop(key, None) for key in KEYS)
        if weight is None:
            return RowsPart(self, path, {})
        options = config.get(OPTION)
        if not isinstance(options, dict) or set(options) != {"keep"} or not isinstance(options["keep"], bool):
            raise BundleError(
                f"{path} has {OPTION}={str(options)[:80]}: expected whether the logits of words stay"
            )
        for name, value, axes in (("weight", weight, 2), ("bias", bias, 1)):
            if value is None:
                continue
            check_values(path, f"{OPTION}.{name}", value)
            if value.dim() != axes or not value.is_floating_point() or len(value) != len(weight):
                raise BundleError(
                    f"{path}: {OPTION}.{name} is {list(value.shape)}: expected one row for each class"
                )
        return RowsPart(self, path, {}, {}, weight, bias, options["keep"])

    def contents(self, part: Part) -> dict[str, Any]:
        """The rows."""
        assert isinstance(part, RowsPart)
        return {} if part.empty else {OPTION: [part.weight, *([] if part.bias is None else [part.bias])]}

    def check_fits(self, program: Program, part: Part) -> None:
        """Raise MisplacedError where the head reads another number of features."""
        assert isinstance(part, RowsPart)
        if part.empty:
            return
        width = int(head_of(program).args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        if part.weight.shape[1] != width:
            raise MisplacedError(
                f"the delta in {part.path} is for another backbone: its rows of classes have {part.weight.shape[1]} features, and the "
                f"program's head reads {width}"
            )

    def attach(self, program: Program, part: Part, by: str) -> list[Edit]:
        """Add the output of the classes."""
        assert isinstance(part, RowsPart)
        if part.empty:
            return []
        self.check_fits(program, part)
        name = add_rows(program, head_of(program), part.weight, part.bias, part.keep, by)
        freeze_backbone(program)
        return [Edit(name, f"{len(part.weight)} classes")]

    def attach_rows(
        self,
        editor: Editor,
        selector: fx.Node,
        parts: Mapping[int, Part],
        names: tuple[str, ...],
        room: Room | None = None,
    ) -> list[Edit]:
        """Nothing; raises PassError for a folder with rows of classes, which rows of a batch cannot choose."""
        for number, part in parts.items():
            if not part.empty:
                raise PassError(
                    f"delta {names[number - 1]!r} in {part.path} has rows of classes, which a row of the batch cannot choose: load it alone "
                    "with LoadDelta"
                )
        return []

    def changed(self, program: Program, part: Part) -> Program:
        """A copy with the same output."""
        assert isinstance(part, RowsPart)
        if part.empty:
            return program
        copy = program.clone()
        self.attach(copy, part, "")
        return copy


def _spec(program: Program) -> TensorSpec:
    return next(spec for spec in program.outputs if spec.name == OUTPUT)


def rows_of(program: Program) -> fx.Node | None:
    """The linear of the classes; None without one."""
    return next(
        (node for node in program.graph.nodes if has_role(node, ROLE) and node.target is aten.linear.default),
        None,
    )


def head_of(program: Program) -> fx.Node:
    """The linear whose outputs [B, S, V] score words; raises PassError where there is none."""
    flow = walk(program.graph)
    tables = {int(node.args[0].meta["val"].shape[0]) for node in flow.embeddings}  # type: ignore[union-attr]
    returned: Any = output_node(program.graph).args[0]
    for spec, node in zip(program.outputs, returned):
        if len(spec.shape) != 3 or spec.shape[2] not in tables or not spec.dtype.is_floating_point:
            continue
        linears = [item for item in products(flow.origins[node]) if traits_of(item).kind is Kind.LINEAR]
        if len(linears) == 1 and linears[0].target is aten.linear.default:
            return linears[0]
    raise PassError(
        "no output [batch, sequence, vocabulary] is made by a linear: there is no head of words to take rows of"
    )


def add_rows(
    program: Program, head: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, keep: bool, by: str
) -> str:
    """Add the output `class_scores` of a linear that reads what the head does; without `keep` the head's own output goes. Returns the
    name of the rows' parameter."""
    if any(spec.name == OUTPUT for spec in program.outputs):
        raise PassError(f"the program has an output {OUTPUT!r} already")
    site = next(
        (str(item.target) for item in head.args[1:2] if isinstance(item, fx.Node) and item.op == "get_attr"),
        head.name,
    )
    origins = walk(program.graph).origins
    with program.edit(by=by) as editor:
        read = []
        for end, value in (("weight", weight), ("bias", bias)):
            if value is None:
                continue
            value = value.to(device=program.device, dtype=head.meta["val"].dtype)
            name = editor.fresh(f"class_rows.{end}")
            node = editor.parameter(name, value, like=head, part=ROLE)
            node.meta["site"] = site
            read.append(node)
        made = editor.call(aten.linear.default, head.args[0], *read, like=head, part=ROLE)
        made.meta["site"] = site
        output = output_node(program.graph)
        values: Any = output.args[0]
        count = len(program.outputs)
        kept = [
            (spec, node)
            for spec, node in zip(program.outputs, values)
            if keep or not (len(spec.shape) == 3 and head in products(origins[node]))
        ]
        spec = TensorSpec(OUTPUT, made.meta["val"].dtype, dims(program, made.meta["val"]))
        output.args = ((*(node for _, node in kept), made, *values[count:]),)
        program.outputs = (*(item for item, _ in kept), spec)
    return str(read[0].target)
