"""A second form of a model, for steps of many positions: products with codes in blocks become products of 8-bit integers.

The kernel of MatMulNBits is made for few rows: it unpacks codes anew for each few of them. Products of bytes with one scale an output take
less than half of its time from 16 rows on, and twice the memory of 4 bits. Activations are rounded to 8 bits as MatMulNBits does itself,
but with one scale for each row and segment of inputs, not for each block of them; weights are rounded once more, with a scale for each
output and segment. Channels that are large in all rows would take the others' bits: each is divided by a factor that its weights are
multiplied by (SmoothQuant, https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from bmgraph.runtime.generation.sampling import Array
from bmgraph.runtime.node_times import all_nodes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

DOMAIN = "com.microsoft"

X, CODES, SCALES, ZEROS, ORDER, BIAS = range(6)
"""Input indices of MatMulNBits."""

GAIN = 1
"""Input index of RMSNormalization."""

LONGEST = 768
"""Inputs of a segment at most: one of thousands would have a scale from one large activation among them all."""

LEAST_MEMORY = 1024
"""Weights of fewer bytes stay in the model itself."""

Bytes = Callable[["TensorProto"], bytes]
"""Gives what a weight stores."""


def rounded_values(model: ModelProto) -> list[str]:
    """The names of the activations f[..., K] that products with another form read."""
    return list(dict.fromkeys(node.input[X] for node in model.graph.node if _fits(node)))


def bytes_of_wide_form(model: ModelProto) -> int:
    """About how many bytes the weights of the second form take."""
    return sum(_size(node, "N") * _size(node, "K") for node in model.graph.node if _fits(node))


def exact_form(model: ModelProto) -> ModelProto:
    """The model whose products round no activations, and that gives `rounded_values` behind its outputs: what codes and scales say."""
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(model)
    for node in found.graph.node:
        if _fits(node):
            next(item for item in node.attribute if item.name == "accuracy_level").i = 1
    for name in rounded_values(model):
        found.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return found


def write_wide_form(model: ModelProto, read: Bytes, seen: Mapping[str, Array], file: Path) -> None:
    """Write a model with the second form of its products to `file`, and its weights to `file` + ".data"; `model` is changed.

    `seen`: examples f[..., K] of each of `rounded_values`.
    """
    import onnx

    graph = model.graph
    held = {item.name: item for item in graph.initializer}
    with open(f"{file}.data", "wb") as data:
        made = [*_shared_constants(), *_Rewriting(held, read, seen, data, file).rewrite(graph)]
        used = {name for node in all_nodes(graph) for name in node.input}
        kept = [item for item in graph.initializer if item.name in used]
        del graph.initializer[:]
        for item in kept:
            graph.initializer.append(_placed(item, read(item), data, file))
        graph.initializer.extend(made)
    if not any(opset.domain == DOMAIN for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    file.write_bytes(model.SerializeToString())


def segments(size: int) -> int:
    """The least number of equal parts of `size` inputs that have LONGEST at most; 1 where none that are half as long divide it."""
    return next(
        (count for count in range(-(-size // LONGEST), 2 * size // LONGEST + 1) if size % count == 0), 1
    )


def _fits(node: NodeProto) -> bool:
    return (
        node.op_type == "MatMulNBits"
        and node.domain == DOMAIN
        and _size(node, "bits") in (2, 4, 8)
        and _size(node, "accuracy_level") == 4
        and (len(node.input) <= ORDER or not node.input[ORDER])
    )


def _size(node: NodeProto, name: str) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), 4 if name == "bits" else 0)


class _Rewriting:
    """Replaces products; `rewrite` gives the weights of the new ones, of which those that are large are in `data`."""

    def __init__(
        self,
        held: Mapping[str, TensorProto],
        read: Bytes,
        seen: Mapping[str, Array],
        data: BinaryIO,
        file: Path,
    ) -> None:
        self._held, self._read, self._seen, self._data, self._file = held, read, seen, data, file
        self._nodes: list[NodeProto] = []
        self._factors: dict[str, Array] = {}
        self._all: list[NodeProto] = []
        self._given = set[str]()

    def rewrite(self, graph: Any) -> Iterator[TensorProto]:
        """Replace the products of a graph in place."""
        self._all, self._given = list(all_nodes(graph)), {item.name for item in graph.output}
        for node in graph.node:
            if not self._is_replaced(node):
                self._nodes.append(node)
                continue
            x, weight = node.input[X], _dequantized(node, self._held, self._read)
            yield from self._rounded(x, weight)
            yield from self._product(node, x, weight * self._factors[x])
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _rounded(self, x: str, weight: Array) -> Iterator[TensorProto]:
        """Smooth and round what products read, once for all that read it."""
        if x in self._factors:
            return
        seen = self._seen[x]
        largest = np.abs(seen).reshape(-1, seen.shape[-1]).max(0)
        self._factors[x] = smoothing(largest, np.abs(weight).max(0))
        norm = self._norm_of(x)
        if norm is None:
            yield self._stored(f"{x}_wide_factors", 1 / self._factors[x])
        else:
            gain = _array(self._held[norm.input[GAIN]], self._read)
            yield self._stored(f"{x}_wide_gain", gain / self._factors[x])
            norm.input[GAIN] = f"{x}_wide_gain"
        count = segments(seen.shape[-1])
        if count > 1:
            yield self._stored(
                f"{x}_wide_split",
                np.array([0] * (seen.ndim - 1) + [count, seen.shape[-1] // count], np.int64),
            )
            yield self._stored(f"{x}_wide_join", np.array([0] * (seen.ndim - 1) + [-1], np.int64))
        self._nodes += _rounding(x, count, norm is not None)

    def _norm_of(self, x: str) -> NodeProto | None:
        """The norm whose output x is, if products with a second form alone read it and its gain f[K] is stored."""
        maker = next((node for node in self._nodes if x in node.output), None)
        if maker is None or maker.op_type != "RMSNormalization" or maker.domain:
            return None
        readers = [node for node in self._all if x in node.input]
        gain = self._held.get(maker.input[GAIN])
        if gain is None or list(gain.dims) != [self._seen[x].shape[-1]] or x in self._given:
            return None
        return maker if all(self._is_replaced(node) for node in readers) else None

    def _is_replaced(self, node: NodeProto) -> bool:
        """Whether a product gets its second form."""
        return (
            _fits(node)
            and node.input[X] in self._seen
            and all(not name or name in self._held for name in node.input[CODES:])
            and _has_known_zeros(node, self._held)
        )

    def _product(self, node: NodeProto, x: str, weight: Array) -> Iterator[TensorProto]:
        """The products of one, a segment each, and their sum."""
        from onnx import helper

        name, count = node.output[0], segments(weight.shape[1])
        bias = node.input[BIAS] if len(node.input) > BIAS else ""
        unbiased = name if not bias else f"{name}_wide_unbiased"
        parts = [f"{name}_wide_{number}_scaled" for number in range(count)] if count > 1 else [unbiased]
        for number, (part, given) in enumerate(zip(np.split(weight, count, 1), parts)):
            scale = np.maximum(np.abs(part).max(1) / 127, 1e-30).astype(np.float32)
            codes = np.ascontiguousarray(np.rint(part / scale[:, None]).astype(np.int8).T)
            label, segment = f"{name}_wide_{number}", _segment(x, number, count)
            yield self._stored(f"{label}_codes", codes)
            yield self._stored(f"{label}_scale", scale)
            self._nodes.append(
                helper.make_node(
                    "MatMulIntegerToFloat",
                    [f"{segment}_rounded", f"{label}_codes", "wide_step", f"{label}_scale", "wide_zero"],
                    [label], domain=DOMAIN, name=f"{label}_product",
                )
            )  # fmt: skip
            self._nodes.append(
                helper.make_node("Mul", [label, f"{segment}_row_scale"], [given], name=f"{label}_scaling")
            )
        if count > 1:
            self._nodes.append(helper.make_node("Sum", parts, [unbiased], name=f"{name}_wide_sum"))
        if bias:
            self._nodes.append(helper.make_node("Add", [unbiased, bias], [name], name=f"{name}_wide_biased"))

    def _stored(self, name: str, values: Array) -> TensorProto:
        from onnx import numpy_helper

        item = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return _placed(item, item.raw_data, self._data, self._file)


def _segment(x: str, number: int, count: int) -> str:
    """What the names of a segment of x begin with."""
    return f"{x}_wide" if count == 1 else f"{x}_wide_{number}"


def smoothing(activations: Array, weights: Array) -> Array:
    """Factors f[K] for channels, from the largest absolute values that activations and weights have there; their geometric mean is 1."""
    factors = np.sqrt(np.maximum(activations, 1e-8) / np.maximum(weights, 1e-8))
    found: Array = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return found


def _rounding(x: str, count: int, folded: bool) -> list[NodeProto]:
    """The nodes that smooth x f[..., K], unless that is `folded` into what makes it, and round each segment of a row to 8 bits: codes
    u8[..., K / count] around 128, and largest absolute values f[..., 1], for each of `count` segments."""
    from onnx import helper

    name = f"{x}_wide"
    smooth = x if folded else f"{name}_smooth"
    parts = smooth if count == 1 else f"{name}_parts"
    # a row of zeros is 0 / 0 here, whose codes are multiplied by its largest value
    steps: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("Abs", [parts], ["abs"], {}),
        ("ReduceMax", [f"{name}_abs", "wide_axis"], ["row_scale"], {"keepdims": 1}),
        ("Div", [parts, f"{name}_row_scale"], ["scaled"], {}),
        ("QuantizeLinear", [f"{name}_scaled", "wide_step", "wide_zero"], ["rounded"], {}),
    ]
    if count > 1:
        steps.insert(0, ("Reshape", [smooth, f"{name}_split"], ["parts"], {}))
    if not folded:
        steps.insert(0, ("Mul", [x, f"{name}_factors"], ["smooth"], {}))
    if count > 1:
        numbers = range(count)
        for value in ("rounded", "row_scale"):
            steps.append(("Reshape", [f"{name}_{value}", f"{name}_join"], [f"{value}_joined"], {}))
            named = [f"{number}_{value}" for number in numbers]
            steps.append(("Split", [f"{name}_{value}_joined"], named, {"axis": -1, "num_outputs": count}))
    return [
        helper.make_node(
            operator,
            inputs,
            [f"{name}_{output}" for output in outputs],
            name=f"{name}_{outputs[0]}_node",
            **options,
        )
        for operator, inputs, outputs, options in steps
    ]


def _shared_constants() -> list[TensorProto]:
    from onnx import numpy_helper

    values: dict[str, Array] = {
        "wide_zero": np.array(128, np.uint8),
        "wide_axis": np.array([-1], np.int64),
        "wide_step": np.array(1 / 127, np.float32),
    }
    return [numpy_helper.from_array(value, name) for name, value in values.items()]


def _has_known_zeros(node: NodeProto, held: Mapping[str, TensorProto]) -> bool:
    """Whether the zero points of a product are packed as its codes are, or all in the middle."""
    from onnx import TensorProto

    name = node.input[ZEROS] if len(node.input) > ZEROS else ""
    return not name or held[name].data_type == TensorProto.UINT8


def _array(item: TensorProto, read: Bytes) -> Array:
    from onnx.helper import tensor_dtype_to_np_dtype

    return np.frombuffer(read(item), tensor_dtype_to_np_dtype(item.data_type))


def _dequantized(node: NodeProto, held: Mapping[str, TensorProto], read: Bytes) -> Array:
    """The weight f32[N, K] of a product."""
    outputs, size = _size(node, "N"), _size(node, "K")
    bits, block = _size(node, "bits"), _size(node, "block_size")
    packed, scales = (_array(held[node.input[index]], read) for index in (CODES, SCALES))
    blocks = -(-size // block)
    codes = _unpacked(packed.reshape(outputs, blocks, -1), bits).astype(np.float32)
    if len(node.input) > ZEROS and node.input[ZEROS]:
        zeros = _array(held[node.input[ZEROS]], read).reshape(outputs, -1)
        codes -= _unpacked(zeros, bits)[:, :blocks, None].astype(np.float32)
    else:
        codes -= 2 ** (bits - 1)
    codes *= scales.astype(np.float32).reshape(outputs, blocks, 1)
    found: Array = codes.reshape(outputs, blocks * block)[:, :size]
    return found


def _unpacked(packed: Array, bits: int) -> Array:
    """Codes of so many bits each, the lowest of a byte first, along the last axis."""
    if bits == 8:
        return packed
    parts = [packed >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def _placed(item: TensorProto, stored: bytes, data: BinaryIO, file: Path) -> TensorProto:
    """The same weight, whose bytes are written behind those that are in `data`, unless they are few."""
    from onnx import TensorProto

    found = TensorProto(name=item.name, data_type=item.data_type, dims=item.dims)
    if len(stored) < LEAST_MEMORY:
        if item.data_location == TensorProto.EXTERNAL:
            found.raw_data = stored
            return found
        return item
    data.write(bytes(-data.tell() % 64))
    place = {"location": f"{file.name}.data", "offset": data.tell(), "length": len(stored)}
    data.write(stored)
    found.data_location = TensorProto.EXTERNAL
    for key, value in place.items():
        entry = found.external_data.add()
        entry.key, entry.value = key, str(value)
    return found
