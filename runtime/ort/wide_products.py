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
    """Replaces products; `rewrite` gives the weights of the new ones, of which those that are large are in `data`.

    A row's scale is multiplied as late as it can be: of a product that only a Mul reads, whose result only products round, it goes to
    their scales. So do the factors that smooth that result, to the scales of the first product's outputs.
    """

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
        self._weights: dict[str, Array] = {}
        self._rounded_values = set[str]()
        self._zeros: dict[object, str] = {}
        self._late: dict[str, str] = {}
        """By the name of a value without them: the scales of its rows."""
        self._readers: dict[str, list[NodeProto]] = {}
        self._given = set[str]()
        self._shapes: dict[str, tuple[str | int, ...]] = {}

    def rewrite(self, graph: Any) -> Iterator[TensorProto]:
        """Replace the products of a graph in place."""
        for node in all_nodes(graph):
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._given = {item.name for item in graph.output}
        for item in graph.value_info:
            sizes = item.type.tensor_type.shape.dim
            self._shapes[item.name] = tuple(size.dim_param or size.dim_value for size in sizes)
        dropped = set[str]()
        for node in graph.node:
            if node.output[0] in dropped:
                continue
            if not self._is_replaced(node):
                self._nodes.append(node)
                continue
            x, weight = node.input[X], self._weight(node)
            yield from self._rounded(x)
            split = self._split(node)
            if split is not None:
                dropped.add(split.output[0])
            yield from self._product(node, split, x, weight * self._factor(x))
            self._weights.pop(node.output[0], None)
        del graph.node[:]
        graph.node.extend(self._nodes)

    def _weight(self, node: NodeProto) -> Array:
        """The weight f32[N, K] of a product, kept until it is replaced."""
        name = node.output[0]
        if name not in self._weights:
            self._weights[name] = _dequantized(node, self._held, self._read)
        return self._weights[name]

    def _factor(self, x: str) -> Array:
        """What smooths x, by the weight of the first product that reads it."""
        if x not in self._factors:
            seen = self._seen[x]
            largest = np.abs(seen).reshape(-1, seen.shape[-1]).max(0)
            first = next(node for node in self._readers[x] if self._is_replaced(node))
            self._factors[x] = smoothing(largest, np.abs(self._weight(first)).max(0))
        return self._factors[x]

    def _rounded(self, x: str) -> Iterator[TensorProto]:
        """Smooth and round what products read, once for all that read it."""
        if x in self._rounded_values:
            return
        self._rounded_values.add(x)
        seen, norm, folded = self._seen[x], self._norm_of(x), x in self._late
        if norm is not None:
            gain = _array(self._held[norm.input[GAIN]], self._read)
            yield self._stored(f"{x}_wide_gain", gain / self._factor(x))
            norm.input[GAIN] = f"{x}_wide_gain"
        elif not folded:
            yield self._stored(f"{x}_wide_factors", 1 / self._factor(x))
        size, count = seen.shape[-1], segments(seen.shape[-1])
        if count > 1:
            shape = np.array([0] * (seen.ndim - 1) + [count, size // count], np.int64)
            yield self._stored(f"{x}_wide_split", shape)
        self._nodes += _rounding(
            x, count, size // count, norm is not None or folded, self._late.get(x), self._zeros_of(x, count)
        )

    def _zeros_of(self, x: str, count: int) -> tuple[str, bool]:
        """The name of the zero points of x, one for each segment of a row, and whether there are any yet: values whose rows are known to
        be as many share them."""
        rows = self._shapes.get(x, ())[:-1]
        if not rows or not all(rows):
            return f"{x}_wide_zeros", False
        key = (rows, count)
        known = key in self._zeros
        return self._zeros.setdefault(key, f"{x}_wide_zeros"), known

    def _norm_of(self, x: str) -> NodeProto | None:
        """The norm whose output x is, if products with a second form alone read it and its gain f[K] is stored."""
        maker = next((node for node in self._nodes if x in node.output), None)
        if maker is None or maker.op_type != "RMSNormalization" or maker.domain:
            return None
        gain = self._held.get(maker.input[GAIN])
        if gain is None or list(gain.dims) != [self._seen[x].shape[-1]]:
            return None
        return maker if self._is_only_rounded(x) else None

    def _is_only_rounded(self, x: str) -> bool:
        """Whether products with a second form alone read a value."""
        return x not in self._given and all(self._is_replaced(node) for node in self._readers.get(x, ()))

    def _is_replaced(self, node: NodeProto) -> bool:
        """Whether a product gets its second form."""
        return (
            _fits(node)
            and node.input[X] in self._seen
            and all(not name or name in self._held for name in node.input[CODES:])
            and _has_known_zeros(node, self._held)
        )

    def _split(self, node: NodeProto) -> NodeProto | None:
        """The Split of its last axis that alone reads a product without a bias, in stored sizes: each part is then a product."""
        readers = self._readers.get(node.output[0], ())
        if node.output[0] in self._given or len(readers) != 1 or _bias_of(node):
            return None
        found = readers[0]
        last = (-1, self._seen[node.input[X]].ndim - 1)
        if found.op_type != "Split" or found.domain or _attribute(found, "axis", 0) not in last:
            return None
        return found if len(found.input) == 2 and found.input[1] in self._held else None

    def _product(
        self, node: NodeProto, split: NodeProto | None, x: str, weight: Array
    ) -> Iterator[TensorProto]:
        """The products of one, for each part of its outputs and each segment of its inputs, and their sums."""
        names, parts = [node.output[0]], [weight]
        if split is not None:
            sizes = _array(self._held[split.input[1]], self._read)
            names, parts = list(split.output), np.split(weight, np.cumsum(sizes)[:-1])
        for name, part in zip(names, parts):
            late = self._smoothed_later(name, node, part.shape)
            if late is not None:
                part = part / self._factor(late)[:, None]
                self._late[late] = f"{x}_wide_row_scale"
            yield from self._summed(name, _bias_of(node), x, part, late is not None)

    def _summed(self, name: str, bias: str, x: str, weight: Array, late: bool) -> Iterator[TensorProto]:
        """The product of x with a weight f32[N, K], as the sum of those of its segments; without the scales of rows if these come
        `late`."""
        from onnx import helper

        count = segments(weight.shape[1])
        unbiased = name if not bias else f"{name}_wide_unbiased"
        scaled = [f"{name}_wide_{number}_scaled" for number in range(count)] if count > 1 else [unbiased]
        for number, (part, given) in enumerate(zip(np.split(weight, count, 1), scaled)):
            scale = np.maximum(np.abs(part).max(1) / 127, 1e-30).astype(np.float32)
            codes = np.ascontiguousarray(np.rint(part / scale[:, None]).astype(np.int8).T)
            label, segment = f"{name}_wide_{number}", _segment(x, number, count)
            yield self._stored(f"{label}_codes", codes)
            yield self._stored(f"{label}_scale", scale)
            self._nodes.append(
                helper.make_node(
                    "MatMulIntegerToFloat",
                    [f"{segment}_rounded", f"{label}_codes", "wide_one", f"{label}_scale", "wide_zero"],
                    [given if late else label], domain=DOMAIN, name=f"{label}_product",
                )
            )  # fmt: skip
            if not late:
                self._nodes.append(
                    helper.make_node("Mul", [label, f"{segment}_row_scale"], [given], name=f"{label}_scaling")
                )
        if count > 1:
            self._nodes.append(helper.make_node("Sum", scaled, [unbiased], name=f"{name}_wide_sum"))
        if bias:
            self._nodes.append(helper.make_node("Add", [unbiased, bias], [name], name=f"{name}_wide_biased"))

    def _smoothed_later(self, name: str, node: NodeProto, shape: tuple[int, ...]) -> str | None:
        """What a Mul makes of a part of a product, of the weight `shape` (N, K), if nothing else reads the part and products alone, which
        round it, read what it makes; None too where rows have several scales or a bias."""
        readers = self._readers.get(name, ())
        if name in self._given or len(readers) != 1 or _bias_of(node) or segments(shape[1]) > 1:
            return None
        product = readers[0]
        if product.op_type != "Mul" or product.domain or product.input[0] == product.input[1]:
            return None
        found = product.output[0]
        if found not in self._seen or found in self._late or self._seen[found].shape[-1] != shape[0]:
            return None
        return found if self._readers.get(found) and self._is_only_rounded(found) else None

    def _stored(self, name: str, values: Array) -> TensorProto:
        from onnx import numpy_helper

        item = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return _placed(item, item.raw_data, self._data, self._file)


def _bias_of(node: NodeProto) -> str:
    """The name of a product's bias; empty without one."""
    return str(node.input[BIAS]) if len(node.input) > BIAS else ""


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(item.i) for item in node.attribute if item.name == name), default)


def _segment(x: str, number: int, count: int) -> str:
    """What the names of a segment of x begin with."""
    return f"{x}_wide" if count == 1 else f"{x}_wide_{number}"


def smoothing(activations: Array, weights: Array) -> Array:
    """Factors f[K] for channels, from the largest absolute values that activations and weights have there; their geometric mean is 1."""
    factors = np.sqrt(np.maximum(activations, 1e-8) / np.maximum(weights, 1e-8))
    found: Array = (factors / np.exp(np.log(factors).mean())).astype(np.float32)
    return found


def _rounding(
    x: str, count: int, size: int, folded: bool, late: str | None, zeros: tuple[str, bool]
) -> list[NodeProto]:
    """The nodes that smooth x f[..., count * size], unless that is `folded` into what makes it, and round each segment of a row to 8 bits:
    codes u8[..., size] around 128, and their scales f[..., 1], for each of `count` segments. `late`: scales of rows that x lacks; `zeros`:
    the name of the zero points, and whether other nodes make them."""
    from onnx import helper

    name = f"{x}_wide"
    smooth = x if folded else f"{name}_smooth"
    parts = smooth if count == 1 else f"{name}_parts"
    named, known = zeros
    scales = f"{name}_scales" if count > 1 else f"{name}_row_scale"
    own = scales if late is None else f"{name}_own_scales"
    rounded = f"{name}_codes" if count > 1 else f"{name}_rounded"
    # a row of zeros is 0 / 0 here, whose codes are multiplied by 0
    steps: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
    if not folded:
        steps.append(("Mul", [x, f"{name}_factors"], [smooth], {}))
    if count > 1:
        steps.append(("Reshape", [smooth, f"{name}_split"], [parts], {}))
    steps += [
        ("Abs", [parts], [f"{name}_abs"], {}),
        ("ReduceMax", [f"{name}_abs", "wide_axis"], [f"{name}_largest"], {"keepdims": int(count == 1)}),
        ("Mul", [f"{name}_largest", "wide_step"], [own], {}),
    ]
    if not known:
        steps += [
            ("Shape", [own], [f"{named}_shape"], {}),
            ("Expand", ["wide_zero", f"{named}_shape"], [named], {}),
        ]
    steps.append(("QuantizeLinear", [smooth, own, named], [rounded], {"axis": -1, "block_size": size}))
    if late is not None:
        steps.append(("Mul", [own, late], [scales], {}))
    if count > 1:
        for value, kind in ((rounded, "rounded"), (scales, "row_scale")):
            segmented = [f"{name}_{number}_{kind}" for number in range(count)]
            steps.append(("Split", [value], segmented, {"axis": -1, "num_outputs": count}))
    return [
        helper.make_node(operator, inputs, outputs, name=f"{outputs[0]}_node", **options)
        for operator, inputs, outputs, options in steps
    ]


def _shared_constants() -> list[TensorProto]:
    from onnx import numpy_helper

    values: dict[str, Array] = {
        "wide_zero": np.array(128, np.uint8),
        "wide_axis": np.array([-1], np.int64),
        "wide_step": np.array(1 / 127, np.float32),
        "wide_one": np.array(1, np.float32),
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
