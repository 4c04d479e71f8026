"""Finds whether a residual stream can be rotated: what writes to it and reads it, and the norms in between.

Every value of the stream is multiplied by one orthogonal matrix along its channels. What is linear in a value and the same for all of its
channels passes that on; a norm without weights does, too, if the matrix keeps the mean (layer norms) or always (RMS norms). So the weights
of norms move into the linears that read them: a value behind a norm is `pending` until it is read, by the weight and bias of that norm.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.coupling.coupled_dims import Spread, where
from bmgraph.analysis.coupling.index_tracing import is_movement, moved_inputs
from bmgraph.analysis.coupling.op_rules import rank
from bmgraph.analysis.interpreter import reads_no_input
from bmgraph.analysis.structure.norms import norm_name
from bmgraph.analysis.structure.sites import Structure
from bmgraph.analysis.structure.value_origins import stem
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.ops.trait_row import Dims, Kind
from bmgraph.ops.traits import argument, calls, is_elementwise, traits_of

aten = torch.ops.aten

Pending = tuple[fx.Node | None, fx.Node | None]
"""The weight and the bias of a norm, as nodes, that a value lacks."""

NOTHING: Pending = (None, None)

WHOLE_OUTPUT, TO_STREAM, FROM_NORM = "output", "entry", "norm"
"""What a product with a matrix is for: an output of the program, a value that enters the stream, one whose norm has weights that no
linear takes."""


class CannotRotateError(Exception):
    """A stream cannot be rotated; the message says what prevents it."""


@dataclass(frozen=True)
class Read:
    """A call that reads a value of the stream by a weight: `tensor` along its dimension `dim`."""

    call: fx.Node
    value: fx.Node
    tensor: fx.Node
    dim: int


@dataclass(frozen=True)
class Bridge:
    """A reader of a value that needs a product with a matrix in between; `kind` says which, `pending` what the value lacks."""

    user: fx.Node
    value: fx.Node
    kind: str
    pending: Pending = NOTHING


@dataclass(frozen=True)
class ChannelScale:
    """A factor of each channel, the parameter `name` (LayerScale), of what a linear gives: its weight, along `dim`, and bias take it."""

    name: str
    tensor: fx.Node
    dim: int
    bias: fx.Node | None


@dataclass
class StreamPlan:
    """How one stream is rotated.

    `tensors`: each parameter of the stream by name, with the dimensions that are its channels. `reads`: calls that take the weight
    and bias of a norm into their weight; `shared`: those that would, but for others that read the same tensor (a tied embedding).
    `scales`: factors of channels that writers take. `affine`: weights and biases of norms that become ones and zeros. `keeps_mean`: the matrix must leave the mean of channels as it is.
    """

    site: str
    width: int
    tensors: dict[str, list[int]] = field(default_factory=dict)
    reads: list[tuple[Read, Pending]] = field(default_factory=list)
    scales: list[ChannelScale] = field(default_factory=list)
    shared: list[Read] = field(default_factory=list)
    affine: list[Pending] = field(default_factory=list)
    bridges: list[Bridge] = field(default_factory=list)
    keeps_mean: bool = False


def plan_stream(program: Program, structure: Structure, site: str, spread: Spread) -> StreamPlan:
    """How the stream whose channels spread so is rotated. Raises CannotRotateError where it cannot be."""
    return _Planner(program, structure, site, spread).plan()


class _Planner:
    """Follows one stream through the graph."""

    def __init__(self, program: Program, structure: Structure, site: str, spread: Spread) -> None:
        self._program, self._spread = program, spread
        self._width = max(len(labels) for labels in spread.labels.values())
        self._dims: dict[fx.Node, list[int]] = {}
        for node, dim in spread.labels:
            self._dims.setdefault(node, []).append(dim)
        self._plan = StreamPlan(site, self._width)
        self._repeated = {name for layer in structure.layers for name in layer.sites}
        self._within: set[str] = set()
        self._stacks = len(structure.stacks)
        self._affine = self._norm_weights()
        self._pending: dict[fx.Node, Pending] = {}
        self._reads: list[tuple[Read, Pending]] = []
        self._constants: set[fx.Node] = set()
        for node in program.graph.nodes:
            if node.op != "placeholder" and self._constants.issuperset(node.all_input_nodes):
                self._constants.add(node)

    def plan(self) -> StreamPlan:
        """Check every call that has to do with the stream, then the tensors that several of them read."""
        if all(int(labels.max()) < self._width - 1 for labels in self._spread.labels.values()):
            raise CannotRotateError("weights that read it are masked: rotate before Prune")
        for node in self._program.graph.nodes:
            if node in self._affine or not (node in self._dims or self._inputs(node)):
                continue
            self._check_order(node)
            if node.op == "output":
                self._end(node)
            elif node.op == "placeholder":
                self._enter(node)
            elif node.op == "get_attr":
                self._own(node)
            else:
                self._call(node)
        for (user, operand, dim), labels in self._spread.cuts.items():
            self._check_labels(labels, user)
            if traits_of(user).kind is not Kind.SUM or dim != rank(operand) - 1:
                raise CannotRotateError(f"{where(user)} reads {operand.name} along its channels")
            self._plan.bridges.append(Bridge(user, operand, TO_STREAM))
        self._settle()
        return self._plan

    def _norm_weights(self) -> set[fx.Node]:
        """What computes the weights and biases of norms, and is read by nothing else."""
        norms = [node for node in self._dims if traits_of(node).kind is Kind.NORM]
        found: set[fx.Node] = set()
        for norm in norms:
            for item in (argument(norm, "weight"), argument(norm, "bias")):
                if isinstance(item, fx.Node) and reads_no_input(item):
                    found.update(upstream(item))
        for node in found:
            other = next((user for user in node.users if user not in found and user not in norms), None)
            if other is not None:
                raise CannotRotateError(f"{where(other)} reads the weight of a norm too")
        return found

    def _carries(self, item: object) -> bool:
        return isinstance(item, fx.Node) and item in self._dims and item not in self._affine

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        """The operands of a call that are values or tensors of the stream."""
        return [item for item in node.all_input_nodes if self._carries(item)]

    def _check_order(self, node: fx.Node) -> None:
        """The channels of a value must be all those of the stream, in their order; of a weight along each of its dimensions."""
        dims = self._dims.get(node, [])
        for dim in dims:
            self._check_labels(self._spread.labels[node, dim], node)
        if len(dims) > 1 and node not in self._constants:
            raise CannotRotateError(f"{where(node)} has the channels along two dimensions")

    def _check_labels(self, labels: torch.Tensor, node: fx.Node) -> None:
        if not torch.equal(labels, torch.arange(self._width)):
            raise CannotRotateError(f"{where(node)} puts channels into another order, or takes some of them")

    def _end(self, node: fx.Node) -> None:
        for item in self._inputs(node):
            self._bridge(Bridge(node, item, WHOLE_OUTPUT, self._pending[item]))

    def _enter(self, node: fx.Node) -> None:
        """An input of the program is rotated where it is read."""
        for user in node.users:
            if traits_of(user).kind is not Kind.SIZE:
                self._bridge(Bridge(user, node, TO_STREAM))
        self._pending[node] = NOTHING

    def _own(self, node: fx.Node) -> None:
        name = str(node.target)
        value = node.meta["val"]
        if name not in self._program.parameters or not value.is_floating_point():
            if name in self._program.buffers and value.is_floating_point():
                raise CannotRotateError(f"{name} is a buffer, not a parameter")
            said = (
                "a mask"
                if value.dtype == torch.bool
                else f"{value.dtype}, which takes no product with a matrix"
            )
            raise CannotRotateError(f"{name} is {said}: rotate before the pass that made it")
        self._plan.tensors[name] = list(self._dims[node])
        self._pending[node] = NOTHING

    def _bridge(self, bridge: Bridge) -> None:
        if self._last(bridge.value) is None:
            raise CannotRotateError(f"{where(bridge.user)} reads channels that are not the last dimension")
        self._plan.bridges.append(bridge)

    def _last(self, node: fx.Node) -> int | None:
        """The last dimension of a value if that is its channels."""
        dims = self._dims.get(node, [])
        return dims[0] if dims == [rank(node) - 1] else None

    def _call(self, node: fx.Node) -> None:
        """One call: a norm, a product with a weight, or what passes a rotation on."""
        row, inputs = traits_of(node), self._inputs(node)
        if row.kind is Kind.SIZE or (row.dims in (Dims.SIZES_ALONE, Dims.NEW) and node not in self._dims):
            return
        if row.kind is Kind.SPLIT:
            self._pending[node] = self._pending[inputs[0]]
            return
        if row.kind is Kind.NORM:
            self._norm(node)
            return
        read = self._read(node)
        if read is not None:
            self._reads.append((read, self._pending[read.value]))
        if read is not None or self._writes(node):
            self._pending[node] = NOTHING
            return
        if row.kind is Kind.SCALING and self._scale(node, inputs):
            self._pending[node] = NOTHING
            return
        passed = self._passed(node)
        pending = {self._pending[item] for item in passed} or {NOTHING}
        if len(pending) > 1:
            for item in passed:
                self._complete(node, item)
            pending = {NOTHING}
        (self._pending[node],) = pending

    def _norm(self, node: fx.Node) -> None:
        x = node.args[0]
        if not calls(node, aten.rms_norm, aten.layer_norm) or not self._carries(x):
            raise CannotRotateError(f"{where(node)} is no norm over all channels")
        assert isinstance(x, fx.Node)
        if self._last(x) is None or list(node.args[1]) != [self._width]:  # type: ignore[arg-type, call-overload]
            raise CannotRotateError(f"{where(node)} does not run over all channels alone")
        self._complete(node, x)
        self._plan.keeps_mean |= calls(node, aten.layer_norm)
        weight, bias = argument(node, "weight"), argument(node, "bias")
        for item in (weight, bias):
            if isinstance(item, fx.Node) and not reads_no_input(item):
                raise CannotRotateError(f"{where(node)} has weights that an input gives")
        self._pending[node] = (weight, bias)

    def _complete(self, user: fx.Node, value: fx.Node) -> None:
        """Give a value what it lacks in front of a reader that cannot take it, unless that would be so in every layer."""
        pending = self._pending[value]
        if pending == NOTHING:
            return
        norm = self._norm_of(value)
        name = norm_name(self._program, norm)
        if name in self._repeated:
            self._within.add(name)
        if len(self._within) > self._stacks:
            raise CannotRotateError(
                f"norms with weights are within it, between layers (post-norm): {', '.join(sorted(self._within))}; behind each of "
                f"them it would have to be rotated again, for {where(user)}"
            )
        self._bridge(Bridge(user, value, FROM_NORM, pending))

    def _norm_of(self, value: fx.Node) -> fx.Node:
        """The norm that a value comes from."""
        while traits_of(value).kind is not Kind.NORM:
            value = next(item for item in self._inputs(value) if self._pending[item] != NOTHING)
        return value

    def _read(self, node: fx.Node) -> Read | None:
        """How a product reads the stream by a weight; None if it does not."""
        row, args = traits_of(node), node.args
        x: Any = args[0] if args else None
        if not self._carries(x):
            return None
        if row.kind in (Kind.LINEAR, Kind.EXPERTS):
            if self._last(x) is None:
                raise CannotRotateError(f"{where(node)} reads channels that are not the last dimension")
            tensor, transposed = self._plain(node, args[1])
            return Read(node, x, tensor, 0 if transposed else rank(tensor) - 1)
        weight = args[1] if row.dims is Dims.MATMUL and self._last(x) is not None else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and rank(weight) == 2:
            return Read(node, x, weight, 0)
        if row.kind is Kind.CONVOLUTION and self._dims[x] == [1]:
            tensor, _ = self._plain(node, args[1])
            return Read(node, x, tensor, 1)
        return None

    def _scale(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        """Whether a product scales each channel of what a linear gives to nothing else by a parameter, which moves into the linear."""
        factors = [item for item in inputs if item.op == "get_attr" and rank(item) == 1]
        if len(inputs) != 2 or len(factors) != 1 or len(factors[0].users) != 1:
            return False
        (factor,) = factors
        value = inputs[1 - inputs.index(factor)]
        while traits_of(value).kind is Kind.DROPOUT and len(value.users) == 1:
            value = value.args[0]  # type: ignore[assignment]
        if traits_of(value).kind is not Kind.LINEAR or len(value.users) != 1:
            return False
        tensor, transposed = self._plain(value, value.args[1])
        bias = argument(value, "bias")
        readers = [item for item in (tensor, bias) if item is not None and len(item.users) != 1]
        if readers or (bias is not None and bias.op != "get_attr"):
            return False
        self._plan.scales.append(ChannelScale(str(factor.target), tensor, 1 if transposed else 0, bias))
        del self._plan.tensors[str(factor.target)]
        return True

    def _plain(self, node: fx.Node, weight: Any) -> tuple[fx.Node, bool]:
        """The parameter that is a weight, and whether it is stored as [in, out]."""
        transposed = weight.target is aten.t.default
        tensor = weight.args[0] if transposed else weight
        if tensor.op != "get_attr":
            raise CannotRotateError(
                f"the weight of {where(node)} is computed by {stem(tensor)}: rotate before the pass that made it so"
            )
        return tensor, transposed

    def _writes(self, node: fx.Node) -> bool:
        """Whether a call gives values of the stream by a weight alone."""
        row, args = traits_of(node), node.args
        if row.kind in (Kind.LINEAR, Kind.EXPERTS, Kind.CONVOLUTION):
            self._plain(node, args[1])
            return True
        if row.kind is Kind.EMBEDDING:
            return True
        product = row.dims is Dims.MATMUL and isinstance(args[1], fx.Node)
        return product and args[1].op == "get_attr" and not self._carries(args[0])  # type: ignore[union-attr]

    def _passed(self, node: fx.Node) -> list[fx.Node]:
        """The operands whose rotation is that of the result. Raises CannotRotateError for a call that passes none on."""
        row, inputs = traits_of(node), self._inputs(node)
        if node in self._dims and inputs and self._passes(node, inputs):
            return inputs
        if self._is_scalar_product(node):
            for item in inputs:
                self._complete(node, item)
            return []
        if node in self._constants:
            names = [
                str(item.target) for item in upstream(node) if item.op == "get_attr" and item in self._dims
            ]
            raise CannotRotateError(
                f"{names[0] if names else node.name} is a part of an expression, {stem(node)}: rotate before the pass that made it"
            )
        raise CannotRotateError(
            f"{where(node)} "
            + ("reads it" if inputs else "gives it")
            + f", and a rotation does not pass through {'it' if row.kind is not Kind.UNKNOWN else stem(node)}"
        )

    def _passes(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        row, args = traits_of(node), node.args
        tensors = [item for item in args if isinstance(item, fx.Node) and rank(item)]
        if row.kind in (Kind.SUM, Kind.DIFFERENCE):
            # A number beside the value would be added to all channels.
            cut = {operand for user, operand, _ in self._spread.cuts if user is node}
            return len(args) == 2 and all(self._carries(item) or item in cut for item in args)
        if row.kind in (Kind.SCALING, Kind.QUOTIENT):
            others = [item for item in tensors if item is not inputs[0]]
            first = row.kind is Kind.SCALING or args[0] is inputs[0]
            return len(inputs) == 1 and args.count(inputs[0]) == 1 and first and self._alike(node, others)
        if calls(node, aten.masked_fill):
            return inputs == [args[0]] and args[2] in (0, 0.0) and self._alike(node, [args[1]])
        if row.kind in (Kind.CAST, Kind.DROPOUT) or (row.linear and is_elementwise(node)):
            return inputs == [args[0]]
        if is_movement(node) or row.dims in (Dims.PERMUTED, Dims.EXPANDED):
            padded = calls(node, aten.constant_pad_nd) and argument(node, "value", 0) not in (None, 0, 0.0)
            moved = moved_inputs(node)
            if (
                node.target is not None
                and isinstance(moved[0], fx.Node)
                and traits_of(moved[0]).kind is Kind.SPLIT
            ):
                moved = moved_inputs(moved[0])
            return not padded and all(self._carries(item) for item in moved)
        if row.dims is Dims.REDUCED:
            return row.linear and inputs == [args[0]]
        if row.dims is Dims.MATMUL:  # a mean of rows
            return inputs == [args[1]] and self._last(inputs[0]) is not None and self._last(node) is not None
        if row.kind is Kind.ATTENTION:
            return inputs == [args[2]] and self._last(inputs[0]) is not None and self._last(node) is not None
        return False

    def _alike(self, node: fx.Node, others: Iterable[Any]) -> bool:
        """Whether operands are the same for all channels."""
        (dim,) = self._dims[node]
        back = rank(node) - dim
        return all(rank(item) < back or item.meta["val"].shape[rank(item) - back] == 1 for item in others)

    def _is_scalar_product(self, node: fx.Node) -> bool:
        """Whether a call multiplies values of the stream by each other along the channels: a rotation of both changes nothing."""
        if traits_of(node).dims is not Dims.MATMUL or node in self._dims:
            return False
        first, second = node.args[:2]
        if not (self._carries(first) and self._carries(second)):
            return False
        return self._last(first) is not None and self._dims[second] == [rank(second) - 2]  # type: ignore[arg-type, index]

    def _settle(self) -> None:
        """Decide which reads take the weights of norms into theirs: all reads of a tensor must agree."""
        wanted: dict[fx.Node, set[Pending]] = {}
        for read, pending in self._reads:
            wanted.setdefault(read.tensor, set()).add(pending)
        readers = {read.call for read, _ in self._reads}
        for tensor, found in wanted.items():
            for user in tensor.users:
                ends = list(user.users) if user.target is aten.t.default else [user]
                if any(end not in readers for end in ends):
                    found.add(NOTHING)
        for read, pending in self._reads:
            if pending == NOTHING:
                continue
            takes = self._takes(read, pending)
            if takes and len(wanted[read.tensor]) == 1:
                self._plan.reads.append((read, pending))
                continue
            self._complete(read.call, read.value)
            if takes:
                self._plan.shared.append(read)
        used = {pending for read, pending in self._plan.reads}
        used |= {bridge.pending for bridge in self._plan.bridges}
        self._plan.affine = sorted(used - {NOTHING}, key=str)

    def _takes(self, read: Read, pending: Pending) -> bool:
        """Whether the weight of a call takes the weight of a norm, and its bias, which no other weight may share, the norm's bias."""
        if pending[1] is None:
            return True
        if traits_of(read.call).kind not in (Kind.LINEAR, Kind.EXPERTS):
            return False
        bias = argument(read.call, "bias")
        if bias is None:
            return True
        same = {one.call for one, _ in self._reads if one.tensor is read.tensor}
        return (
            bias.op == "get_attr"
            and str(bias.target) in self._program.parameters
            and same.issuperset(bias.users)
        )
