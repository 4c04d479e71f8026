"""Translate a program to a plain `onnx_ir` model, with provenance on its nodes."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.backends.onnx import contrib_ops
from bmgraph.backends.onnx.cache_reads import CAUSAL
from bmgraph.backends.onnx.export_block_codes import block_code_translations, store_by_type
from bmgraph.backends.onnx.export_experts_gathered import gathered_translations
from bmgraph.backends.onnx.export_experts_split import block_product_translations
from bmgraph.backends.onnx.export_sort import sort_translations
from bmgraph.backends.onnx.rewrites.cache_attention import CAUSAL as CAUSAL_READ
from bmgraph.backends.onnx.rewrites.graph_utils import NODE, PASS, SCOPES, SITE
from bmgraph.backends.onnx.simplify import simplify
from bmgraph.backends.onnx.slice_experts import slice_experts
from bmgraph.errors import BackendError
from bmgraph.ir.node_role import NodeRole, has_role
from bmgraph.ir.program import Program
from bmgraph.ir.tensor_spec import graph_output_names
from bmgraph.lowering.to_exported_program import MARK, exported_program
from bmgraph.ops.outside import find_outside, is_outside
from bmgraph.ops.quantization import BLOCK_TOP

OPSET = 23

FOLDED_BYTES = 4096
"""Largest constant, in bytes, that is folded; larger ones, such as dequantised weights, stay expressions."""


def translations() -> dict[Callable[..., object], Callable[..., object]]:
    """Operators of `bmgraph.ops`, and of torch where its exporter has none -> their ONNX translations."""
    from onnxscript import opset23

    op: Any = opset23

    def dequantize(codes: Any, scale: Any, axis: int) -> Any:
        if len(scale.shape) == 1:
            return op.DequantizeLinear(codes, scale, axis=axis)
        rows = op.Reshape(
            codes, op.Constant(value_ints=[-1, codes.shape[-1]])
        )  # f[E, O, I] as f[E * O, I]: one scale per row
        scales = op.Reshape(scale, op.Constant(value_ints=[-1]))
        return op.Reshape(
            op.DequantizeLinear(rows, scales, axis=0), op.Constant(value_ints=list(codes.shape))
        )

    def quantize_static(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def quantize_dynamic(x: Any) -> Any:
        wide = x if x.dtype == ir.DataType.FLOAT else op.Cast(x, to=ir.DataType.FLOAT)
        codes, scale, zero_point = op.DynamicQuantizeLinear(wide)
        result = op.DequantizeLinear(codes, scale, zero_point)
        return result if x.dtype == ir.DataType.FLOAT else op.CastLike(result, x)

    def quantize_blocks(x: Any, block: int) -> Any:
        blocks = op.Reshape(x, op.Constant(value_ints=[*[0] * (len(x.shape) - 1), -1, block]))
        maximum = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[-1]), keepdims=1)
        step = op.Div(maximum, op.CastLike(op.Constant(value_float=float(BLOCK_TOP)), x))
        zero, one = (op.CastLike(op.Constant(value_float=value), x) for value in (0.0, 1.0))
        divisor = op.Where(op.Greater(step, zero), step, one)
        return op.Reshape(op.Mul(op.Round(op.Div(blocks, divisor)), divisor), op.Shape(x))

    def by_rows(few: Any, many: Any, x: Any, limit: int) -> Any:
        fits = op.LessOrEqual(op.Size(x), op.Constant(value_int=limit))
        return op.Where(fits, few, many)  # which becomes an If, by branch_by_rows

    ours = torch.ops.bmgraph
    return (
        gathered_translations()
        | sort_translations()
        | {
            ours.dequantize.default: dequantize,
            ours.quantize_static.default: quantize_static,
            ours.quantize_dynamic.default: quantize_dynamic,
            ours.quantize_blocks.default: quantize_blocks,
            ours.by_rows.default: by_rows,
            ours.multi_head_attention.default: _attention_translation(op),
        }
        | block_code_translations()
        | block_product_translations()
    )


def _attention_translation(op: Any) -> Callable[..., Any]:
    """The ONNX form of `bmgraph::multi_head_attention`, by the operators of the opset `op`."""
    attention = contrib_ops.multi_head_attention()

    def multi_head_attention(
        query: Any,
        key: Any,
        value: Any,
        padding: Any,
        heads: int,
        scale: float,
        causal: bool,
        blind: float | None = None,
    ) -> Any:
        options = {"num_heads": heads, "scale": scale, "unidirectional": int(causal)}
        if padding is None:
            return attention(query, key, value, None, None, **options)
        mask = op.Cast(padding, to=ir.DataType.INT32)
        if blind is not None:
            return attention(query, key, value, None, mask, mask_filter_value=blind, **options)
        attended = attention(query, key, value, None, mask, **options)
        # not CastLike: the optimizer replaces it by a node that does not say its origin
        real = op.Cast(op.Cast(padding, to=ir.DataType.BOOL), to=query.dtype)
        first = op.Constant(value_int=1)
        if causal:
            seen = op.Unsqueeze(op.Sign(op.CumSum(real, first)), op.Constant(value_ints=[-1]))
        else:
            seen = op.Unsqueeze(op.ReduceMax(real, op.Constant(value_ints=[1])), op.Constant(value_ints=[-1]))
        return op.Mul(attended, seen)  # a query that sees no key gets 0; the kernel gives it a mean

    return multi_head_attention


def translate(
    program: Program, overrides: Mapping[Callable[..., object], Callable[..., object]] | None = None
) -> ir.Model:
    """Translate a deployed program to ONNX without rewriting it; `overrides` replace entries of `translations()`.

    Raises BackendError for an operator that cannot be translated, naming it, its module and its source line.
    """
    table = {**translations(), **_of_other_packages(program), **(overrides or {})}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        model = _translated(program, table)
    finally:
        logger.setLevel(level)
    store_by_type(model)
    _fold(model)
    slice_experts(model)
    _record_provenance(model, program)
    return model


def _translated(program: Program, table: Mapping[Callable[..., Any], Callable[..., Any]]) -> ir.Model:
    """What torch's exporter makes of a program; where its parts alone cannot be decomposed, the whole is traced again."""
    names = [spec.name for spec in program.inputs]
    outputs = graph_output_names(program.inputs, program.outputs)
    error: Exception | None = None
    for locally in (True, False):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                result = torch.onnx.export(
                    exported_program(program, locally), (), input_names=names, output_names=outputs,
                    opset_version=OPSET, dynamo=True, optimize=False, verbose=False, custom_translation_table={**table},
                )  # fmt: skip
        except Exception as found:  # torch.onnx raises many types; the user gets one line
            error = found
        else:
            assert result is not None
            return result.model
    assert error is not None
    raise BackendError(_export_error(error, program)) from error


def _fold(model: ir.Model) -> None:
    """Fold constants of a translated model, in place. Raises BackendError where onnxscript's optimiser fails on it."""
    import onnxscript

    try:
        simplify(model, FOLDED_BYTES)
    except Exception as error:  # it evaluates operators, which raise many types
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        raise BackendError(
            f"the optimiser of onnxscript {onnxscript.__version__} failed on the translated model ({type(error).__name__}: "
            f"{first[:200]}): install another version of onnxscript, or keep this model on torch, backend=Torch()"
        ) from error


def _of_other_packages(program: Program) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations of the operators of other packages that a program calls; raises BackendError if one lacks it."""
    found: dict[Callable[..., Any], Callable[..., Any]] = {}
    for node in program.graph.nodes:
        if not is_outside(node.target):
            continue
        item = find_outside(node.target)
        if item is None or item[1].onnx is None:
            whose = (
                "no installed package adds it"
                if item is None
                else f"package {item[0]} gives no Operator.onnx"
            )
            raise BackendError(f"{_unsupported(node)} ({whose})")
        found[node.target] = item[1].onnx
    return found


def _export_error(error: BaseException, program: Program) -> str:
    """One line on a failed export; names the operator of the program that the exporter's messages mention."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = "\n".join(str(item) for item in chain)
    for node in program.graph.nodes:
        if node.op == "call_function" and str(node.target) in text:
            return _unsupported(node)
    missing = re.search(r"op='\w+\.(\w+)'", text)  # the exporter may have decomposed the operator
    if missing:
        calls = [node for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        part = _plain(missing.group(1))
        found = [
            node
            for node in calls
            if (name := _plain(node.target._schema.name)) in part or name.endswith(part)
        ]
        if found:
            return _unsupported(max(found, key=lambda node: len(_plain(node.target._schema.name))))
    first = next((line for line in str(chain[-1]).splitlines() if line.strip()), type(error).__name__)
    return f"the program cannot be translated to ONNX: {first[:300]}"


def _plain(name: str) -> str:
    """The name of an operator without namespace and underscores: a part such as `prims.erf_inv` is named after `erfinv`."""
    return name.rpartition("::")[2].replace("_", "")


def _unsupported(node: fx.Node) -> str:
    """One line on an operator that ONNX lacks: its name, module path and source line."""
    from bmgraph.utils.user_frame import user_line

    where = node.meta.get("scope") or "the model's root"
    line = user_line(node.meta.get("stack_trace") or "")
    location = f"{where} ({line})" if line else where
    return (
        f"operator {node.target} in {location} cannot be translated to ONNX: "
        "replace it in the model, or keep that part on torch"
    )


def _record_provenance(model: ir.Model, program: Program) -> None:
    """Set the provenance of every ONNX node (SITE, PASS, NODE), and remove MARK from its module path."""
    nodes = {node.name: node for node in program.graph.nodes}
    for item in model.graph.all_nodes():
        scopes = item.metadata_props.get(SCOPES, "")
        if MARK not in scopes:
            continue
        path = scope_parts(scopes)
        name = next((part for part in reversed(path) if part.startswith(MARK)), "").removeprefix(MARK)
        item.metadata_props[SCOPES] = repr([part for part in path if not part.startswith(MARK)])
        source = nodes.get(name)
        if source is None:
            continue
        item.metadata_props[NODE] = name
        item.metadata_props[SITE] = str(source.meta.get("site") or _site_of(source))
        item.metadata_props[PASS] = _pass_of(source)
        if source.meta.get(CAUSAL):
            item.metadata_props[CAUSAL_READ] = source.meta[CAUSAL]


def scope_parts(text: str) -> list[str]:
    """Parse a list of strings that torch's exporter wrote as text."""
    return [part.strip().strip("'\"") for part in text.strip("[]").split(",")]


def _pass_of(node: fx.Node) -> str:
    """The pass that made a node; for a linear, the pass that made its weight."""
    maker = node.meta.get("pass")
    if not maker and len(node.args) > 1 and isinstance(node.args[1], fx.Node):
        weight = node.args[1]
        weight = weight.args[0] if weight.target is torch.ops.aten.t.default else weight  # type: ignore[assignment]
        maker = (
            weight.meta.get("pass")
            if isinstance(weight, fx.Node) and has_role(weight, NodeRole.WEIGHT)
            else None
        )
    return str(maker or "capture")


def _site_of(node: fx.Node) -> str:
    """The weight of a linear, norm or embedding; the module path of any other node."""
    for argument in node.args[1:3]:
        if (
            isinstance(argument, fx.Node)
            and argument.op == "get_attr"
            and str(argument.target).endswith("weight")
        ):
            return str(argument.target)
        if isinstance(argument, fx.Node) and has_role(argument, NodeRole.WEIGHT):
            return str(argument.meta.get("site"))
    return str(node.meta.get("scope", ""))
