"""Let products and lookups read codes of blocks, for which ONNX Runtime has kernels, instead of weights made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import bmgraph.ops  # noqa: F401  (registers our operators)
from bmgraph.analysis.interpreter import evaluate
from bmgraph.errors import BackendError
from bmgraph.ir.editor import Editor, remove_dead
from bmgraph.ir.evaluation import upstream
from bmgraph.ir.program import Program
from bmgraph.ops.block_codes import block_arguments, block_size
from bmgraph.runtime.ort.session import onnxruntime_version

aten = torch.ops.aten
ours = torch.ops.bmgraph

SINCE = {2: (1, 24)}
"""Bits of a code -> the first onnxruntime whose MatMulNBits takes them, where not all that we support do."""

ROUNDED_SINCE = {2: (1, 28)}
"""Bits of a code -> the first onnxruntime that rounds inputs beside them to 8 bits; before, it computes in float at any level."""

FLOAT_ALONE = frozenset({(2, 16)})
"""Bits and block beside which no onnxruntime rounds inputs, up to 1.32."""

SMALL = 8
"""How many times smaller than a weight a value must be that is computed of it once."""


def read_block_codes(program: Program) -> int:
    """Replace linears, products of experts and embeddings of such weights by `bmgraph::linear_blocks`,
    `bmgraph::experts_linear_blocks` and `bmgraph::embedding_blocks`, in place; returns the count.

    The rounding of a product's input by the same blocks is left to the kernel, where it does so. Raises BackendError, which names the
    site, where anything else reads such a weight, since it would have to be made at every call, and where the installed onnxruntime has
    no kernel for such codes.
    """
    count = 0
    with program.edit() as editor:
        _compute_small(editor)
        for node in list(editor.graph.nodes):
            if node.target is aten.linear.default:
                count += _read_by_linear(editor, node)
            elif node.target is ours.experts_linear.default:
                count += _read_by_experts(editor, node)
            elif node.target is aten.embedding.default:
                count += _read_by_embedding(editor, node)
        for node in list(editor.graph.nodes):
            if node.target is ours.quantize_blocks.default and node.users:
                _fill_last_block(editor, node)
    if not count and not any(node.target is ours.dequantize_blocks.default for node in program.graph.nodes):
        return 0
    remove_dead(program)
    for node in program.graph.nodes:
        if node.target is ours.dequantize_blocks.default:
            reader = next(iter(node.users))
            raise BackendError(
                f"{node.meta.get('site', node.name)}: its weight is in {node.args[2]}-bit codes, which {reader.target} reads as "
                "numbers, and ONNX Runtime has no kernel for that: leave the site out (exclude=), or quantize after what changes it"
            )
    return count


def _compute_small(editor: Editor) -> None:
    """Compute what is made of such weights alone and is small beside them, such as the norms of rows that DoRA divides by."""
    program, constant = editor.program, set[fx.Node]()
    for node in list(editor.graph.nodes):
        if node.op == "get_attr" or (
            node.op == "call_function" and constant.issuperset(node.all_input_nodes)
        ):
            constant.add(node)
    for node in [item for item in editor.graph.nodes if item in constant and item.op == "call_function"]:
        if all(user in constant for user in node.users):
            continue
        weights = [item for item in upstream(node) if item.target is ours.dequantize_blocks.default]
        value = node.meta["val"]
        if weights and SMALL * value.numel() <= max(item.meta["val"].numel() for item in weights):
            name = editor.fresh(f"{weights[0].meta.get('site', node.name)}_computed")
            made = editor.parameter(name, evaluate(program, node).contiguous(), like=node, frozen=True)
            node.replace_all_uses_with(made)


def _read_by_linear(editor: Editor, linear: fx.Node) -> int:
    weight = _codes_of(linear.args[1])
    if weight is None:
        return 0
    given = block_arguments(weight)
    x, bias = linear.args[0], linear.args[2] if len(linear.args) > 2 else None
    assert isinstance(x, fx.Node)
    _check_version(weight, given.bits)
    block, rounded = block_size(given.codes.meta["val"], given.bits), False
    if _kernel_rounds(given.bits, block):
        x, rounded = _unrounded(editor, x, block)
    new = editor.call(
        ours.linear_blocks.default, x, given.codes, given.scale, bias, given.bits, given.columns, rounded, *given.readers[2:],
        like=linear, site=str(weight.meta.get("site", "")),
    )  # fmt: skip
    editor.replace(linear, new)
    return 1


def _read_by_experts(editor: Editor, product: fx.Node) -> int:
    weight = _codes_of(product.args[1])
    if weight is None:
        return 0
    given = block_arguments(weight)
    _check_version(weight, given.bits)
    x, _, ids, *bias = product.args
    assert isinstance(x, fx.Node)
    block = block_size(given.codes.meta["val"], given.bits)
    rounded = (
        x.target is ours.quantize_blocks.default and x.args[1] == block and _kernel_rounds(given.bits, block)
    )
    new = editor.call(
        ours.experts_linear_blocks.default, x.args[0] if rounded else x, given.codes, given.scale, ids, bias[0] if bias else None,
        given.bits, given.columns, rounded, *given.readers[2:],
        like=product, site=str(weight.meta.get("site", "")),
    )  # fmt: skip
    editor.replace(product, new)
    return 1


def _check_version(weight: fx.Node, bits: int) -> None:
    """Raise BackendError where the installed onnxruntime has no product with such codes."""
    needed = SINCE.get(bits)
    if needed is not None and onnxruntime_version() < needed:
        here, first = (".".join(map(str, item)) for item in (onnxruntime_version(), needed))
        raise BackendError(
            f"{weight.meta.get('site', weight.name)}: its weight is in {bits}-bit codes, which onnxruntime multiplies by since {first}, "
            f"and {here} is installed: install a newer one, or quantize to int4"
        )


def _kernel_rounds(bits: int, block: int) -> bool:
    """Whether the product with such codes rounds blocks of its input; where it does not, the graph goes on to say so."""
    since = ROUNDED_SINCE.get(bits)
    return (bits, block) not in FLOAT_ALONE and (since is None or onnxruntime_version() >= since)


def _unrounded(editor: Editor, x: fx.Node, block: int) -> tuple[fx.Node, bool]:
    """An input before it is rounded by such blocks, and whether it is; of a rounded one some positions may be picked, such as the last."""
    if x.target is ours.quantize_blocks.default and x.args[1] == block:
        return x.args[0], True  # type: ignore[return-value]
    if x.target is aten.index_select.default and x.args[1] in range(x.meta["val"].dim() - 1):
        source = x.args[0]
        assert isinstance(source, fx.Node)
        if source.target is ours.quantize_blocks.default and source.args[1] == block:
            return editor.call(aten.index_select.default, source.args[0], *x.args[1:], like=x), True
    return x, False


def _fill_last_block(editor: Editor, rounding: fx.Node) -> None:
    """Round an input whose last block is not whole with zeros behind it, since the translation to ONNX takes whole blocks."""
    x, block = rounding.args
    assert isinstance(x, fx.Node)
    assert isinstance(block, int)
    width = int(x.meta["val"].shape[-1])
    if width % block:
        filled = editor.call(aten.constant_pad_nd.default, x, [0, -width % block], like=rounding)
        rounded = editor.call(ours.quantize_blocks.default, filled, block, like=rounding)
        editor.replace(rounding, editor.call(aten.slice.Tensor, rounded, -1, 0, width, like=rounding))


def _read_by_embedding(editor: Editor, lookup: fx.Node) -> int:
    weight = _codes_of(lookup.args[0])
    if weight is None:
        return 0
    given = block_arguments(weight)
    codes, bits, columns = given.codes, given.bits, given.columns
    if columns * bits % 8:
        return 0
    program, name = editor.program, f"{codes.target}_by_row"
    if name not in program.parameters:
        packed = program.tensor(str(codes.target))
        rows = packed.flatten(1)[:, : columns * bits // 8].contiguous()
        editor.parameter(name, rows, like=codes, frozen=True)
    new = editor.call(
        ours.embedding_blocks.default, editor.read(name), lookup.args[1], given.scale, bits,
        block_size(codes.meta["val"], bits), *given.readers[2:],
        like=lookup, site=str(weight.meta.get("site", "")),
    )  # fmt: skip
    editor.replace(lookup, new)
    return 1


def _codes_of(node: Any) -> fx.Node | None:
    """The call that makes a weight of codes that are parameters, behind an even number of transposes; None for another."""
    if not isinstance(node, fx.Node):
        return None
    inner = node.args[0] if node.target is aten.t.default else None
    if isinstance(inner, fx.Node) and inner.target is aten.t.default:
        return _codes_of(inner.args[0])
    if node.target is not ours.dequantize_blocks.default:
        return None
    return node if all(item.op == "get_attr" for item in block_arguments(node).readers) else None
