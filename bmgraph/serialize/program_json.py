"""Encodes a program as JSON and decodes them: only allowed operators, and nothing in a file is evaluated."""

from __future__ import annotations

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
from bmgraph.ir.node_role import KEY, role_in_file
from bmgraph.ir.pass_record import Record
from bmgraph.ir.printer import target_text
from bmgraph.ir.program import FORWARD, Program, output_node
from bmgraph.ir.step_rules import read_rules
from bmgraph.ir.tensor_spec import DTYPE_NAMES
from bmgraph.ir.verifier import check_program
from bmgraph.ops.aten_in_files import ATEN
from bmgraph.ops.outside import is_outside
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import row_of
from bmgraph.serialize.bounded_shapes import check_sizes, propagate_untrusted
from bmgraph.serialize.outside_operators import PACKAGES, Operators, needed_packages
from bmgraph.serialize.signature_json import DTYPES, decode_signature, encode_signature, is_name, text_in

SCALARS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in
       ("add", "sub", "mul", "floordiv", "mod", "neg", "truediv", "eq", "ne", "lt", "le", "gt", "ge", "getitem", "pow")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite")},
}  # fmt: skip
"""Functions on sizes, by their name in the file."""

_SCALAR_NAMES: dict[Any, str] = {function: name for name, function in SCALARS.items()}

_OPERATOR = re.compile(r"(aten|bmgraph)\.([A-Za-z_][A-Za-z0-9_]*)(?:\.([A-Za-z_][A-Za-z0-9_]*))?\Z")
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\Z")

MOST_NODES = 40_000
"""Of all graphs together: shape inference takes about a millisecond for each."""
MOST_GRAPHS = 16
SIGNATURES = "signatures"
"""Key of the signatures of other graphs than `forward`, by their names."""
STEP_RULES = "step_rules"
"""Key of what training does beside its steps."""
SAVED_METADATA = ("scope", "site", KEY, "pass", "source")


def encode(program: Program) -> dict[str, object]:
    """A program without its tensors, as JSON values; raises BundleError if a node cannot be saved."""
    packages = needed_packages(program)
    count = sum(len(graph.nodes) for graph in program.graphs.values())
    if count > MOST_NODES:
        raise BundleError(f"the program has {count} nodes: at most {MOST_NODES} can be saved")
    if FORWARD not in program.graphs:
        raise BundleError(f"the program has no graph {FORWARD!r}: save the whole program, not a part of it")
    others = {name: encode_signature(item) for name, item in program.signatures.items() if name != FORWARD}
    return {
        "graphs": {
            name: [_encode_node(node) for node in graph.nodes] for name, graph in program.graphs.items()
        },
        **encode_signature(program.signatures[FORWARD]),
        **({SIGNATURES: others} if others else {}),
        "parameters": list(program.parameters),
        "buffers": list(program.buffers),
        "ties": dict(program.ties),
        "frozen": sorted(program.frozen),
        **({"trained_whole": sorted(program.trained_whole)} if program.trained_whole else {}),
        **({"lr_factors": dict(program.lr_factors)} if program.lr_factors else {}),
        **({STEP_RULES: [rule.as_json() for rule in program.step_rules]} if program.step_rules else {}),
        **({"memory": program.memory} if program.memory is not None else {}),
        "training": program.training,
        **({"backward": program.backward} if program.backward else {}),
        "fingerprint": program.fingerprint,
        **({"computation": program.computation.as_json()} if program.computation else {}),
        **(
            {"generation": program.generation.as_json()} if program.generation != GenerationDefaults() else {}
        ),
        **({PACKAGES: packages} if packages else {}),
        "history": [record.as_json() for record in program.history],
    }


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
    signatures = [data, *data.get(SIGNATURES, {}).values()]
    specs = [spec for item in signatures for spec in (*item.get("inputs", ()), *item.get("outputs", ()))]
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
        propagate_untrusted(program)
        for entry in program.entries():
            _check_outputs(entry)
        check_program(program)
        for entry in program.entries():
            entry.inputs = with_value_ranges(entry)  # programs of early versions do not say it
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
    for name in tensors:
        if not _is_tensor_name(name):
            raise BundleError(f"{name!r} is not a valid tensor name")
    ties = {text_in(alias): text_in(name) for alias, name in data["ties"].items()}
    if not set(ties.values()) <= set(tensors) or set(ties) & set(tensors):
        raise BundleError("a tie names a tensor that the program does not have")
    trees = _signatures_in(data)
    if sum(len(nodes) for nodes in data["graphs"].values()) > MOST_NODES:
        raise BundleError(
            f"expected each graph as a list of 1 to {MOST_NODES} nodes, and no more of all graphs together"
        )
    signatures = {
        name: decode_signature(tree, set(buffers), _example_of(name, example)) for name, tree in trees.items()
    }
    if sum(len(item.example) for item in signatures.values()) != len(example):
        raise BundleError("the example has inputs that the program does not have")
    return Program(
        graphs={
            name: _decode_graph(data["graphs"][name], set(tensors), {s.name for s in item.inputs}, outside)
            for name, item in signatures.items()
        },
        parameters={name: tensors[name] for name in parameters},
        buffers={name: tensors[name] for name in buffers},
        signatures=signatures,
        ties=ties,
        frozen=frozenset(map(text_in, data["frozen"])) & set(parameters),
        trained_whole=frozenset(map(text_in, data.get("trained_whole", []))),
        lr_factors=_lr_factors(data.get("lr_factors", {}), set(parameters)),
        step_rules=read_rules(data.get(STEP_RULES, []), set(tensors), set(buffers)),
        memory=_memory(data.get("memory")),
        training=text_in(data["training"]),
        backward=text_in(data.get("backward", "")),
        fingerprint=text_in(data.get("fingerprint", "")),
        computation=Computation.from_json(data["computation"]) if "computation" in data else Computation(),
        generation=GenerationDefaults.from_json(data.get("generation", {})),
        history=tuple(Record.from_json(item) for item in data["history"]),
    )


def _lr_factors(data: Any, parameters: set[str]) -> dict[str, float]:
    """The factors of learning rates in a file. Raises BundleError for one of no parameter, or that is no number above 0."""
    for name, value in data.items():
        if name not in parameters or type(value) not in (int, float) or not 0 < value < math.inf:
            raise BundleError(
                f"the file has lr_factors of {str(name)[:80]!r}: {str(value)[:80]}; expected parameters with a number above 0"
            )
    return {name: float(value) for name, value in data.items()}


def _memory(data: Any) -> int | None:
    """The limit of memory in a file. Raises BundleError if it is not a number of bytes."""
    if data is not None and not (type(data) is int and 0 < data < 2**63):
        raise BundleError(f"the file has the limit of memory {str(data)[:80]!r}: expected a number of bytes")
    return data  # type: ignore[no-any-return]


def _signatures_in(data: Any) -> dict[str, Any]:
    """The JSON values of each graph's signature; those of `forward` are the file's own. Raises BundleError."""
    trees = {FORWARD: data, **data.get(SIGNATURES, {})}
    if set(data["graphs"]) != set(trees) or FORWARD in data.get(SIGNATURES, {}):
        raise BundleError(
            f"the program has the graphs {str(sorted(data['graphs']))[:200]}: expected {FORWARD!r}, and others with a signature "
            "each"
        )
    if len(trees) > MOST_GRAPHS or not all(map(is_name, trees)):
        raise BundleError(f"a program has at most {MOST_GRAPHS} graphs, whose names are identifiers")
    return {name: trees[name] for name in data["graphs"]}


def _example_of(graph: str, example: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of one graph in a file's example, where those of others than `forward` begin with the graph's name."""
    if graph == FORWARD:
        return {name: value for name, value in example.items() if "." not in name}
    prefix = f"{graph}."
    return {name.removeprefix(prefix): value for name, value in example.items() if name.startswith(prefix)}


def encode_examples(program: Program) -> dict[str, torch.Tensor]:
    """The examples of all graphs as one table, as `decode` takes it."""
    return {
        name if graph == FORWARD else f"{graph}.{name}": value
        for graph, signature in program.signatures.items()
        for name, value in signature.example.items()
    }


def _check_outputs(program: Program) -> None:
    values: Any = output_node(program.graph).args[0]
    for spec, node in zip(program.outputs, values):
        found = node.meta["val"]
        if found.dtype != spec.dtype or found.dim() != len(spec.shape):
            raise BundleError(
                f"output {spec.name!r} has another dtype or number of dimensions than the file declares"
            )


def _is_tensor_name(text: str) -> bool:
    """Whether a dotted name can be a tensor of a module without hiding an attribute of `nn.Module`."""
    return _TENSOR_NAME.match(text) is not None and all(
        part and not part.startswith("__") and not hasattr(nn.Module, part) for part in text.split(".")
    )


def _decode_graph(nodes: Any, tensors: set[str], inputs: set[str], outside: Operators) -> fx.Graph:
    if not isinstance(nodes, list) or not 0 < len(nodes) <= MOST_NODES:
        raise BundleError(f"expected a graph as a list of 1 to {MOST_NODES} nodes")
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for position, item in enumerate(nodes):
        name, op = text_in(item["name"]), item["op"]
        if not is_name(name) or name in known:
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
                text_in(key): _decode_value(value, known) for key, value in item.get("kwargs", {}).items()
            }
            if not all(map(is_name, kwargs)):
                raise BundleError(f"node {name!r} has an invalid argument name, one of {sorted(kwargs)}")
            node = graph.create_node(
                "call_function", _target(text_in(item["target"]), outside), args, kwargs, name
            )
        elif op == "output":
            node = graph.output(tuple(_decode_value(value, known) for value in item["args"]))
            node.meta = {}
        else:
            raise BundleError(f"node {name!r} has the unknown kind {op!r}")
        if node.op != "output" and node.name != name:
            raise BundleError(f"{name!r} is not a valid node name")
        found = {key: text_in(value) for key, value in item.get("meta", {}).items() if key in SAVED_METADATA}
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
    if kind == "dtype" and content in DTYPES:
        return DTYPES[content]
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
