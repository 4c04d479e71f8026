"""Encodes a program's graphs as JSON and decodes them: only allowed operators, and nothing in a file is evaluated."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

import bmgraph.ops  # noqa: F401  (registers the custom operators)
from bmgraph.analysis.value_ranges import with_value_ranges
from bmgraph.errors import BundleError
from bmgraph.ir.computation import Computation
from bmgraph.ir.generation_defaults import GenerationDefaults
from bmgraph.ir.input_kind import InputKind
from bmgraph.ir.node_role import KEY, role_in_file
from bmgraph.ir.pass_record import Record
from bmgraph.ir.printer import target_text
from bmgraph.ir.program import Program, output_node
from bmgraph.ir.tensor_spec import DTYPE_NAMES, Range, TensorSpec
from bmgraph.ir.verifier import check_program
from bmgraph.ops.aten_in_files import ATEN
from bmgraph.ops.outside import is_outside
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import row_of
from bmgraph.serialize.bounded_shapes import check_sizes, propagate_untrusted
from bmgraph.serialize.cache_json import decode_cache, encode_cache
from bmgraph.serialize.outside_operators import PACKAGES, Operators, needed_packages

SCALARS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in
       ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "pow")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")},
}  # fmt: skip
"""Functions on sizes, by their name in the file."""

_SCALAR_NAMES: dict[Any, str] = {function: name for name, function in SCALARS.items()}

_OPERATOR = re.compile(r"(aten|bmgraph)\.([A-Za-z_][A-Za-z0-9_]*)(?:\.([A-Za-z_][A-Za-z0-9_]*))?\Z")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")
_SIZE = re.compile(r"[A-Za-z_0-9(][A-Za-z0-9_ +*/().,\-]{0,199}\Z")
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

MOST_NODES = 40_000
"""Of all graphs together: shape inference takes about a millisecond for each."""
MOST_AXES = 64
SAVED_METADATA = ("scope", "site", KEY, "pass", "source")


def encode(program: Program) -> dict[str, object]:
    """A program without its tensors, as JSON values; raises BundleError if a node cannot be saved."""
    packages = needed_packages(program)
    count = sum(len(graph.nodes) for graph in program.graphs.values())
    if count > MOST_NODES:
        raise BundleError(f"the program has {count} nodes: at most {MOST_NODES} can be saved")
    return {
        "graphs": {
            name: [_encode_node(node) for node in graph.nodes] for name, graph in program.graphs.items()
        },
        "inputs": [encode_spec(spec) for spec in program.inputs],
        "outputs": [encode_spec(spec) for spec in program.outputs],
        "ranges": encode_ranges(program.ranges),
        "parameters": list(program.parameters),
        "buffers": list(program.buffers),
        "ties": dict(program.ties),
        "writes": list(program.writes),
        "losses": list(program.losses),
        "frozen": sorted(program.frozen),
        **({"trained_whole": sorted(program.trained_whole)} if program.trained_whole else {}),
        "training": program.training,
        **({"backward": program.backward} if program.backward else {}),
        "fixed": list(program.fixed),
        **({"narrower": list(program.narrower)} if program.narrower else {}),
        "ignored": list(program.ignored),
        "unproven": list(program.unproven),
        "cache": encode_cache(program.cache),
        "fingerprint": program.fingerprint,
        **({"computation": program.computation.as_json()} if program.computation else {}),
        **(
            {"generation": program.generation.as_json()} if program.generation != GenerationDefaults() else {}
        ),
        **({PACKAGES: packages} if packages else {}),
        "history": [record.as_json() for record in program.history],
    }


def encode_spec(spec: TensorSpec) -> dict[str, object]:
    """An input or output spec as JSON values."""
    encoded: dict[str, Any] = {"name": spec.name, "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}
    if spec.names:
        encoded["names"] = list(spec.names)
    if spec.values is not None:
        encoded["values"] = list(spec.values)
    if spec.kind is not None:
        encoded["kind"] = str(spec.kind)
    return encoded


def encode_ranges(ranges: Mapping[str, Range]) -> dict[str, object]:
    """Ranges of dynamic sizes as JSON values."""
    return {name: [item.low, item.high] for name, item in ranges.items()}


def _encode_node(node: fx.Node) -> dict[str, Any]:
    metadata = {key: str(node.meta[key]) for key in SAVED_METADATA if node.meta.get(key)}
    encoded: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "call_function":
        target: Any = node.target
        encoded["target"] = _SCALAR_NAMES.get(target) or target_text(target)
        if not is_outside(target):
            _target(encoded["target"], {})  # refuse to save what could not be loaded
        encoded["args"] = [_encode_value(item) for item in node.args]
        if node.kwargs:
            encoded["kwargs"] = {key: _encode_value(item) for key, item in node.kwargs.items()}
    elif node.op == "output":
        encoded["args"] = [_encode_value(item) for item in node.args[0]]  # type: ignore[union-attr]
    else:
        encoded["target"] = str(node.target)
    if metadata:
        encoded["meta"] = metadata
    return encoded


def _encode_value(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_encode_value(item) for item in value]
    raise BundleError(f"an argument of type {type(value).__name__} cannot be saved")


def _check_tree(data: Any) -> None:
    """Raise BundleError unless a decoded file is an object with sizes that can be evaluated."""
    if not isinstance(data, dict):
        raise BundleError("the file does not hold a valid program: it is not a JSON object")
    specs = [*data.get("inputs", ()), *data.get("outputs", ())]
    check_sizes([dim for spec in specs for dim in spec["shape"] if isinstance(dim, str)])


def decode(
    data: Any,
    tensors: Mapping[str, torch.Tensor],
    example: Mapping[str, torch.Tensor],
    outside: Operators = MappingProxyType({}),
) -> Program:
    """The inverse of `encode`, with the tensors added; raises BundleError for anything that is not a valid program.

    `outside`: the operators of other packages that the program may call, by name (`trusted_operators`).
    """
    try:
        _check_tree(data)
        program = _decode(data, tensors, example, outside)
        outputs = program.outputs
        propagate_untrusted(program)
        values: Any = output_node(program.graph).args[0]
        for spec, node in zip(outputs, values):
            found = node.meta["val"]
            if found.dtype != spec.dtype or found.dim() != len(spec.shape):
                raise BundleError(
                    f"output {spec.name!r} has another dtype or number of dimensions than the file declares"
                )
        check_program(program)
        program.inputs = with_value_ranges(program)  # programs of early versions do not say it
    except BundleError:
        raise
    except Exception as error:  # a malicious file can make torch raise anything
        first = str(error).splitlines()[0] if str(error) else ""
        raise BundleError(
            f"the file does not hold a valid program: {type(error).__name__}: {first[:200]}"
        ) from error
    return program


def _decode(
    data: Any, tensors: Mapping[str, torch.Tensor], example: Mapping[str, torch.Tensor], outside: Operators
) -> Program:
    parameters, buffers = list(data["parameters"]), list(data["buffers"])
    if len({*parameters, *buffers}) != len(parameters) + len(buffers) or {*parameters, *buffers} != set(
        tensors
    ):
        raise BundleError("the tensors in the file are not the ones that the program names")
    inputs = tuple(decode_spec(item) for item in data["inputs"])
    for spec in inputs:
        if not _is_name(spec.name):  # fx writes it into the code that it generates
            raise BundleError(f"{spec.name!r} is not a valid input name")
    if len({spec.name for spec in inputs}) != len(inputs):
        raise BundleError("two inputs have the same name")
    for name in tensors:
        if not _is_tensor_name(name):
            raise BundleError(f"{name!r} is not a valid tensor name")
    outputs = tuple(decode_spec(item) for item in data["outputs"])
    ties = {_text(alias): _text(name) for alias, name in data["ties"].items()}
    if not set(ties.values()) <= set(tensors) or set(ties) & set(tensors):
        raise BundleError("a tie names a tensor that the program does not have")
    if not set(data["writes"]) <= set(buffers) or not set(data["losses"]) <= {spec.name for spec in outputs}:
        raise BundleError("the program names buffer writes or losses that it does not have")
    if not set(example) <= {spec.name for spec in inputs}:
        raise BundleError("the example has inputs that the program does not have")
    if set(data["graphs"]) != {"forward"}:
        raise BundleError(f"the program has graphs {sorted(data['graphs'])}: expected only 'forward'")
    for name, item in example.items():
        spec = next(spec for spec in inputs if spec.name == name)
        if item.dtype != spec.dtype or item.dim() != len(spec.shape):
            raise BundleError(
                f"the example of input {name!r} has another dtype or number of dimensions than the input"
            )
    return Program(
        graphs={
            name: _decode_graph(nodes, set(tensors), {s.name for s in inputs}, outside)
            for name, nodes in data["graphs"].items()
        },
        parameters={name: tensors[name] for name in parameters},
        buffers={name: tensors[name] for name in buffers},
        inputs=inputs,
        outputs=outputs,
        ranges=decode_ranges(data["ranges"]),
        ties=ties,
        writes=tuple(map(_text, data["writes"])),
        losses=tuple(map(_text, data["losses"])),
        example=dict(example),
        frozen=frozenset(map(_text, data["frozen"])) & set(parameters),
        trained_whole=frozenset(map(_text, data.get("trained_whole", []))),
        training=_text(data["training"]),
        backward=_text(data.get("backward", "")),
        fixed=tuple(map(_text, data["fixed"])),
        narrower=tuple(map(_text, data.get("narrower", []))),
        ignored=tuple(map(_text, data.get("ignored", []))),
        unproven=tuple(map(_text, data.get("unproven", []))),
        cache=decode_cache(data, inputs, outputs),
        fingerprint=_text(data.get("fingerprint", "")),
        computation=Computation.from_json(data["computation"]) if "computation" in data else Computation(),
        generation=GenerationDefaults.from_json(data.get("generation", {})),
        history=tuple(Record.from_json(item) for item in data["history"]),
    )


def _is_name(text: str) -> bool:
    """Whether a text is an identifier that is safe in generated code: not a keyword, not a dunder name."""
    return _IDENTIFIER.match(text) is not None and not keyword.iskeyword(text) and not text.startswith("__")


def _is_tensor_name(text: str) -> bool:
    """Whether a dotted name can be a tensor of a module without hiding an attribute of `nn.Module`."""
    return _TENSOR_NAME.match(text) is not None and all(
        part and not part.startswith("__") and not hasattr(nn.Module, part) for part in text.split(".")
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BundleError(f"expected a string, found {value!r}")
    return value


def decode_spec(item: Any) -> TensorSpec:
    """The inverse of `encode_spec`; raises BundleError for an invalid name, dtype or size."""
    shape = item["shape"]
    if not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise BundleError(f"{item['name']!r} must have a list of at most {MOST_AXES} sizes as its shape")
    for dim in shape:
        valid = (isinstance(dim, int) and not isinstance(dim, bool) and 0 <= dim < 2**40) or (
            isinstance(dim, str) and _SIZE.match(dim) is not None
        )
        if not valid:
            raise BundleError(f"{dim!r} is not a valid size")
    if item["dtype"] not in _DTYPES:
        raise BundleError(f"{item['dtype']!r} is not a valid dtype")
    names = tuple(_text(name) for name in item.get("names", ()))
    if names and (_DTYPES[item["dtype"]] is not torch.int64 or len(shape) != 1):
        raise BundleError(f"{item['name']!r} has names for its values, but is not an i64 vector")
    values = item.get("values")  # absent in files of early versions
    if values is not None and not _is_value_range(values, _DTYPES[item["dtype"]]):
        raise BundleError(f"{item['name']!r} has the invalid values {values!r}")
    kind = item.get("kind")  # absent for outputs, and in files of early versions
    if kind is not None and kind not in list(InputKind):
        raise BundleError(
            f"{item['name']!r} has the kind {str(kind)[:80]!r}: expected one of {', '.join(InputKind)}"
        )
    return TensorSpec(
        _text(item["name"]),
        _DTYPES[item["dtype"]],
        tuple(shape),
        names,
        tuple(values) if values else None,
        None if kind is None else InputKind(kind),
    )


def _is_value_range(values: Any, dtype: torch.dtype) -> bool:
    """Whether a decoded value is [low, high] or [low, None] of an integer input."""
    if not isinstance(values, list) or len(values) != 2 or dtype not in (torch.int64, torch.int32):
        return False
    low, high = values
    numbers = [low] if high is None else [low, high]
    return all(type(number) is int for number in numbers) and numbers == sorted(numbers)


def decode_ranges(data: Any) -> dict[str, Range]:
    """The inverse of `encode_ranges`; raises BundleError for an invalid range."""
    ranges = {}
    for name, (low, high) in data.items():
        if (
            not isinstance(low, int)
            or not (high is None or isinstance(high, int))
            or low < 0
            or (high is not None and high < low)
        ):
            raise BundleError(f"{name!r} has the invalid range {low!r} to {high!r}")
        ranges[_text(name)] = Range(low, high)
    return ranges


def _decode_graph(nodes: Any, tensors: set[str], inputs: set[str], outside: Operators) -> fx.Graph:
    if not isinstance(nodes, list) or not 0 < len(nodes) <= MOST_NODES:
        raise BundleError(f"expected a graph as a list of 1 to {MOST_NODES} nodes")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for position, item in enumerate(nodes):
        name, op = _text(item["name"]), item["op"]
        if not _is_name(name) or name in known:
            raise BundleError(f"{name!r} is not a valid node name, or is used twice")
        if (op == "output") != (position == len(nodes) - 1):
            raise BundleError("the output node must be the last node of a graph, and the only one")
        if op == "placeholder":
            if item["target"] not in inputs:
                raise BundleError(
                    f"node {name!r} reads the input {item['target']!r}, which the program does not have"
                )
            node = graph.create_node("placeholder", item["target"], (), {}, name)
        elif op == "get_attr":
            if item["target"] not in tensors or not _TENSOR_NAME.match(item["target"]):
                raise BundleError(f"node {name!r} reads {item['target']!r}, which the program does not have")
            node = graph.create_node("get_attr", item["target"], (), {}, name)
        elif op == "call_function":
            args = tuple(_decode_value(value, known) for value in item["args"])
            kwargs = {
                _text(key): _decode_value(value, known) for key, value in item.get("kwargs", {}).items()
            }
            if not all(map(_is_name, kwargs)):
                raise BundleError(f"node {name!r} has an invalid argument name, one of {sorted(kwargs)}")
            node = graph.create_node(
                "call_function", _target(_text(item["target"]), outside), args, kwargs, name
            )
        elif op == "output":
            node = graph.output(tuple(_decode_value(value, known) for value in item["args"]))
            node.meta = {}
        else:
            raise BundleError(f"node {name!r} has the unknown kind {op!r}")
        if node.op != "output" and node.name != name:
            raise BundleError(f"{name!r} is not a valid node name")
        found = {key: _text(value) for key, value in item.get("meta", {}).items() if key in SAVED_METADATA}
        if KEY in found:
            found[KEY] = role_in_file(found[KEY])
        node.meta.update(found)
        known[name] = node
    return graph


def _decode_value(value: Any, known: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode_value(item, known) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise BundleError(f"{value!r} is not a valid argument")
    ((kind, content),) = value.items()
    if kind == "node" and content in known:
        return known[content]
    if kind == "dtype" and content in _DTYPES:
        return _DTYPES[content]
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise BundleError(f"{str(value)[:100]} is not a valid argument")


def _target(text: str, outside: Operators) -> Any:
    """The function of a name in a file; raises BundleError if it is not allowed."""
    if text in SCALARS:
        return SCALARS[text]
    if text in outside:
        _check_signature(text, outside[text])
        return outside[text]
    found = _OPERATOR.match(text)
    if found is None:
        raise BundleError(f"operator {text[:80]!r} is not allowed in a program")
    namespace, name, overload = found.groups()
    if namespace == "aten" and name not in ATEN:
        raise BundleError(f"operator {text!r} is not allowed in a program: capture and passes do not emit it")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    call = getattr(packet, overload or "default", None)
    if not isinstance(call, torch._ops.OpOverload):
        raise BundleError(f"operator {text!r} does not exist in this version of torch")
    _check_signature(text, call)
    if call._schema.is_mutable and not row_of(call).writes:
        raise BundleError(f"operator {text!r} writes in place, which is not allowed in a program")
    return call


def _check_signature(text: str, call: torch._ops.OpOverload) -> None:
    """Allow only dispatcher operators that return tensors or sizes; `aten.save`, for example, would write a file."""
    if not torch._C._dispatch_has_kernel(call._name):
        raise BundleError(f"operator {text!r} is not allowed in a program")
    returned = [str(item.type) for item in call._schema.returns]
    gives_size = row_of(call).kind is Kind.SIZE
    if not returned or not (gives_size or all(kind in ("Tensor", "List[Tensor]") for kind in returned)):
        raise BundleError(f"operator {text!r} is not allowed in a program")
