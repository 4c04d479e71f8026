"""Divides channels of what linears read by scales, and multiplies their weights by these: outputs stay what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from bmgraph.analysis.channel_sources import ChannelSource, ChannelSources, factor_of
from bmgraph.analysis.site_filter import matches
from bmgraph.analysis.structure.finder import find
from bmgraph.analysis.weight_sites import Weight, linears, weight_of
from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.node_role import NodeRole, has_role, is_delta
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import argument, traits_of
from bmgraph.pass_manager.context import Context
from bmgraph.utils.stored_tensor import in_memory

aten = torch.ops.aten

WIDEST = 256.0
"""The largest factor between a scale and the mean of all: no channel is worth more, and half precision holds it."""

BEHIND_NORM = frozenset({Kind.CAST, Kind.DROPOUT, Kind.RESHAPE})
"""Calls between a norm and what reads it, beside products and sums with weights."""


@dataclass(frozen=True)
class ScalableInput:
    """An input, the linears that read it, and what takes its division; None where it is multiplied."""

    x: fx.Node
    readers: list[tuple[fx.Node, Weight]]
    source: ChannelSource | None

    @property
    def site(self) -> str:
        """The first site that reads it."""
        return self.readers[0][1].site

    @property
    def channels(self) -> torch.Tensor:
        """i64[in]: the channel of the source that each input is."""
        return self.source.channels if self.source else torch.arange(int(self.x.meta["val"].shape[-1]))


def scalable_inputs(
    program: Program, context: Context, include: Sequence[str], exclude: Sequence[str], multiply: bool
) -> list[ScalableInput]:
    """The inputs of the chosen linears that can be scaled, and where the scales go; the others are declined.

    With `multiply` what is behind a norm that cannot take them is multiplied.
    """
    sources, found = ChannelSources(program), []
    for x, readers in _chosen(program, context, include, exclude).items():
        others = set(x.users) - {linear for linear, _ in readers}
        source = sources.of(x) if not others else f"{min(others).name} reads its input too"
        if isinstance(source, ChannelSource):
            source = _why_fixed(program, source) or source
        if isinstance(source, ChannelSource):
            found.append(ScalableInput(x, readers, source))
        elif multiply and _behind_norm(x):
            found.append(ScalableInput(x, readers, None))
        else:
            for _, weight in readers:
                context.declined(weight.site, source)
    return found


def scale_input(editor: Editor, context: Context, plan: ScalableInput, scales: torch.Tensor) -> None:
    """Divide an input by scales f64[in], multiply the weights that read it by them, and report it."""
    for _, weight in plan.readers:
        shape = [1, -1] if weight.channel_axis == 0 else [-1, 1]
        _multiply(editor, context, weight.site, scales.reshape(shape))
    tensors = [weight.site for _, weight in plan.readers]
    if plan.source is None:
        _divide(editor, plan, scales)
    else:
        whole = torch.ones(int(plan.source.node.meta["val"].shape[-1]), dtype=torch.double)
        whole[plan.channels] = 1 / scales
        tensors += _divide_source(editor, context, plan.source.node, whole)
    context.edited(
        plan.site,
        f"{len(scales)} channels that it reads are scaled by {float(1 / scales.max()):.2g} to {float(1 / scales.min()):.2g}",
        tensors,
    )


def by_source(values: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """The largest of the values f64[in] of inputs that are the same channel of what gives them: f64[in]."""
    width = int(channels.max()) + 1
    return torch.zeros(width, dtype=torch.double).scatter_reduce(0, channels, values, "amax")[channels]


def balanced(logs: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Scales f64[in] of their logarithms, with a geometric mean of 1 and at most WIDEST; 1 where they are not known."""
    mean = logs[known].mean() if bool(known.any()) else logs.new_zeros(())
    return torch.where(known, (logs - mean).exp().clamp(1 / WIDEST, WIDEST), 1.0)


def _divide(editor: Editor, plan: ScalableInput, scales: torch.Tensor) -> None:
    """Multiply the input by the inverse of the scales."""
    first, site = plan.readers[0][0], plan.site
    value = plan.x.meta["val"]
    factor = editor.parameter(
        editor.fresh(f"{site}_smoothing"),
        (1 / scales).to(value.dtype).to(editor.program.device),
        frozen=True,
        part=NodeRole.SMOOTHING,
    )
    smooth = editor.call(aten.mul.Tensor, plan.x, factor, like=first, site=site, part=NodeRole.SMOOTHING)
    for linear, _ in plan.readers:
        linear.update_arg(0, smooth)


def _chosen(
    program: Program, context: Context, include: Sequence[str], exclude: Sequence[str]
) -> dict[fx.Node, list[tuple[fx.Node, Weight]]]:
    """Input -> the linears to smooth that read it. A value and the same behind dropout are two inputs."""
    roles = find(program).roles
    changed = {node.meta.get("site") for node in program.graph.nodes if is_delta(node)}
    found: dict[fx.Node, list[tuple[fx.Node, Weight]]] = {}
    for linear in linears(program.graph):
        weight = weight_of(program, linear)
        if weight is None or not matches(weight.site, include) or matches(weight.site, exclude):
            continue
        reason = why_kept(program, weight, roles.get(weight.site, ""))
        if not reason and weight.site in changed:
            reason = "a delta changes it: smooth before the delta is added, or after Merge"
        x = linear.args[0]
        assert isinstance(x, fx.Node)
        if reason:
            context.declined(weight.site, reason)
        else:
            found.setdefault(x, []).append((linear, weight))
    return found


def why_kept(program: Program, weight: Weight, role: str, verb: str = "smooth") -> str:
    """Why a weight cannot take scales or a matrix; empty where it can. `verb`: what the pass does."""
    parts = list(upstream(weight.node))
    if any(has_role(part, NodeRole.CODES) for part in parts):
        return f"its weight is quantized: {verb} before that"
    if any(has_role(part, NodeRole.MASK) for part in parts):
        return f"its weight is masked: {verb} before Prune"
    if weight.node.op != "get_attr" or weight.site not in program.parameters:
        return "its weight is an expression"
    value = weight.node.meta["val"]
    if not value.is_floating_point() or value.dim() != 2:
        return f"its weight is {value.dtype} of {value.dim()} dimensions"
    if role == "router":
        return "it is a router: rounding alone may change which experts it selects"
    readers = [reader for user in weight.node.users for reader in _past_transpose(user)]
    if any(traits_of(reader).kind is not Kind.LINEAR for reader in readers):
        return "something else reads its weight too (a tied embedding)"
    return "" if len(readers) == 1 else f"its weight is used {len(readers)} times"


def _past_transpose(node: fx.Node) -> list[fx.Node]:
    return list(node.users) if node.target is aten.t.default else [node]


def _why_fixed(program: Program, source: ChannelSource) -> str:
    """Why the weights of a source cannot be divided; empty where they can."""
    node, width = source.node, int(source.node.meta["val"].shape[-1])
    kind = traits_of(node).kind
    if kind is Kind.LINEAR:
        weight = weight_of(program, node)
        reason = "" if weight is None else why_kept(program, weight, "")
        if weight is None or reason:
            return f"what gives its input cannot be scaled: {reason or 'its weight is an expression'}"
    given = _operands_of_source(node)
    if not given:
        return "the norm in front of it has no weight"
    for item in given:
        plain = item.op == "get_attr" and str(item.target) in program.parameters
        if not plain or len(item.users) != 1:
            return f"{item.target if plain else item.name} in front of it has another reader, or is no plain parameter"
        if kind is not Kind.LINEAR and list(item.meta["val"].shape) != [width]:
            return "the norm in front of it runs over several dimensions"
    return ""


def _operands_of_source(node: fx.Node) -> list[fx.Node]:
    """The weight and bias of a linear or a norm, or the parameter of a product: what is divided."""
    factor = factor_of(node)
    if factor is not None:
        return [factor]
    weight: object = argument(node, "weight")
    if (
        traits_of(node).kind is Kind.LINEAR
        and isinstance(weight, fx.Node)
        and weight.target is aten.t.default
    ):
        weight = weight.args[0]
    found = [weight, argument(node, "bias")] if isinstance(weight, fx.Node) else []
    return [item for item in found if isinstance(item, fx.Node)]


def _behind_norm(x: fx.Node) -> bool:
    """Whether a value is the output of a norm, up to products and sums with weights."""
    node = x
    while traits_of(node).kind is not Kind.NORM:
        kind = traits_of(node).kind
        values = [item for item in node.all_input_nodes if item.op != "get_attr"]
        if kind not in BEHIND_NORM and (kind not in (Kind.SCALING, Kind.SUM) or len(values) != 1):
            return False
        if not values:
            return False
        node = values[0]
    return True


def _divide_source(editor: Editor, context: Context, node: fx.Node, factors: torch.Tensor) -> list[str]:
    """Multiply the outputs of a linear, a norm or a product by factors of its channels; returns the tensors that change."""
    changed = []
    for item in _operands_of_source(node):
        name, value = str(item.target), item.meta["val"]
        transposed = value.dim() == 2 and next(iter(item.users)).target is aten.t.default
        by_row = value.dim() == 2 and not transposed
        _multiply(editor, context, name, factors.reshape([-1, 1]) if by_row else factors)
        changed.append(name)
    return changed


def _multiply(editor: Editor, context: Context, name: str, factors: torch.Tensor) -> None:
    """Multiply a parameter by factors that broadcast."""
    value = in_memory(editor.program.tensor(name))
    factors = factors.to(value.device)
    editor.assign(name, (value.double() * factors).to(value.dtype))
    context.rescaled(name, factors)
