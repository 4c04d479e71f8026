"""Prepare expert feed-forwards for export: choose the operators that run fastest on ONNX Runtime.

Float weights become one product per expert, on the rows that chose it; with more than MAX_SPLIT_EXPERTS experts, one call
of the MoE kernel. 8-bit weights whose inputs are rounded by rows call the QMoE kernel for few tokens, which rounds blocks of a
row, and have one integer product per expert for more (`by_rows`). If activations are rounded by blocks (as the kernel does) or not
at all, 8-bit weights become one call of QMoE. The kernels support ReLU, SiLU, tanh GELU and SwiGLU; a rounded feed-forward with
exact GELU calls QMoE for one token alone. 8-bit products that QMoE does not support (native mixtures, activations quantised per
tensor) become one product per expert. Measured by benchmarks/moe.py.

Shapes: E experts, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from bmgraph.analysis.interpreter import evaluate, reads_no_input
from bmgraph.ir.editor import Editor
from bmgraph.ir.program import Program
from bmgraph.ops.experts import ZERO
from bmgraph.ops.trait_row import Kind
from bmgraph.ops.traits import traits_of

aten = torch.ops.aten
ours = torch.ops.bmgraph

BLOCKS = (256, 128, 64, 32, 16)
"""Block sizes that MatMulNBits supports, fastest first."""

MAX_SPLIT_EXPERTS = 32
"""Most experts of a float feed-forward with one product per expert: each costs two calls even if no token chose it."""

KERNEL_BLOCKS = (128, 256, 64, 32, 16)
"""Block sizes by which QMoE may round rows, fastest first."""

KERNEL_ROWS = (8, 4, 2, 1)
"""Numbers of tokens up to which QMoE may be the form of a feed-forward that has one product per expert for more."""

KERNEL, KERNEL_CALL, KERNEL_WEIGHTS, KERNEL_TANH = 20.0, 1.6, 4.2, 0.017
"""Microseconds of QMoE: for a call with its router, a token's expert, a million weights of that, and a value of tanh."""

DENSE_FEW, DENSE_EIGHT, DENSE_MANY = 13.0, 24.0, 78.0
"""Microseconds in which a dense integer product reads a million weights for up to 4 tokens, for 8, and for 32."""

CALL, ROW = 0.94, 0.75
"""Microseconds that an integer product per expert takes beside its multiplications, and a token with each expert that it chose."""

TANH_ROWS = 1
"""Most tokens for which QMoE is faster than a product per expert by blocks of a row though it computes tanh one value at a time."""

MANY = 32
"""The number of tokens at which forms for many tokens are compared."""

TANH_ERROR = 4.8e-4
"""How far the tanh form of GELU is from the exact one, at most."""


@dataclass(frozen=True)
class _ExpertFFN:
    """A matched feed-forward of experts.

    `x` is its input; `first` its gate and up products, or up alone, each with the half of its output that is used (None:
    all); `down` its last product; `activation` the kernel's name of its activation, `exact` whether the kernel computes
    that activation exactly; `block` the block size by which the kernel quantises inputs of products (0: it does not);
    `rows` whether they are quantised by whole rows instead, or the first and last are rows of one block.
    """

    x: fx.Node
    first: tuple[tuple[fx.Node, int | None], ...]
    down: fx.Node
    activation: str
    exact: bool
    block: int
    rows: bool

    @property
    def experts(self) -> int:
        """E."""
        return int(self.down.args[1].meta["val"].shape[0])  # type: ignore[union-attr]

    @property
    def active(self) -> int:
        """The number of experts that a token chooses."""
        return int(self.down.args[2].meta["val"].shape[-1])  # type: ignore[union-attr]

    @property
    def products(self) -> list[fx.Node]:
        """Its expert products, each once."""
        return list(dict.fromkeys((*(node for node, _ in self.first), self.down)))

    @property
    def finer(self) -> bool:
        """Whether the kernel rounds parts of the rows that are rounded as a whole."""
        sizes = {int(node.args[1].meta["val"].shape[2]) for node in self.products}  # type: ignore[union-attr]
        return self.rows and sizes != {self.block}

    @property
    def weights(self) -> float:
        """Millions of weights of an expert."""
        return sum(node.args[1].meta["val"][0].numel() for node in self.products) / 1e6  # type: ignore[union-attr]

    @property
    def kernel_rows(self) -> int | None:
        """Most tokens for which one call of the kernel is the fastest form, None for any number."""
        if self.exact and not (self.rows and self.splits_well):
            return None
        if not self.rows:
            return TANH_ROWS
        neurons = self.down.args[1].meta["val"].shape[2]  # type: ignore[union-attr]
        one = KERNEL_CALL + KERNEL_WEIGHTS * self.weights + (0 if self.exact else KERNEL_TANH * neurons)
        for rows in KERNEL_ROWS:
            dense = (DENSE_EIGHT if rows == max(KERNEL_ROWS) else DENSE_FEW) * self.weights * self.experts
            if KERNEL + rows * self.active * one < dense:
                return rows
        return 0

    @property
    def split_share(self) -> float:
        """About how long one integer product per expert takes for many tokens, as a share of a dense integer feed-forward."""
        dense = DENSE_MANY * self.weights * self.experts
        calls = len(self.products) * (CALL * self.experts + ROW * MANY * self.active)
        return self.active / self.experts + calls / dense

    @property
    def splits_well(self) -> bool:
        """Whether one integer product per expert takes less time for many tokens than all experts together."""
        return self.split_share < 1


def pack_experts(program: Program) -> tuple[int, list[str]]:
    """Rewrite expert feed-forwards and 8-bit expert products.

    Returns the number of feed-forwards that call a kernel, and what a report says of the forms.
    """
    count = 0
    slow: dict[float, int] = {}
    two_forms: dict[tuple[int, bool, bool], int] = {}
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            match = _match_ffn(node)
            if match is None:
                continue
            packed = _pack_ffn(editor, node, match)
            count += packed
            if packed and match.block and match.kernel_rows:
                form = (match.kernel_rows, match.exact, match.finer)
                two_forms[form] = two_forms.get(form, 0) + 1
            share = _share_of_dense(match) if packed or match.rows else 0.0
            if share > 1:
                slow[round(share, 1)] = slow.get(round(share, 1), 0) + 1
    with program.edit() as editor:
        for node in list(editor.graph.nodes):
            quantised = _codes(program, node) if _is_product(node) else None
            if quantised is not None:
                editor.replace(node, _product_per_expert(editor, node, *quantised))
    notes = [
        f"experts: with many tokens {number} feed-forwards of int8 experts take about {share:g} of the time of a dense one: larger or "
        "fewer experts, or fewer active ones, would save something"
        for share, number in slow.items()
    ]
    return count, notes + [_two_forms_note(number, *form) for form, number in two_forms.items()]


def _two_forms_note(number: int, limit: int, exact: bool, finer: bool) -> str:
    """What a report says of feed-forwards that have a form for few tokens and another for more."""
    differs = [
        *(["rounds blocks of a row, which is finer than the whole rows that more tokens have rounded"] if finer else []),
        *([f"has the tanh form of GELU, at most {TANH_ERROR:g} from the exact one that more tokens get"] if not exact else []),
    ]  # fmt: skip
    depends = "; what a token gives depends on the number of tokens so, by about a step of 8 bits, and never on what the others are"
    return (
        f"experts: with {limit} token{'s or fewer' if limit > 1 else ''} {number} feed-forwards of rounded experts call a kernel"
        f"{' that ' if differs else ''}{' and '.join(differs)}; these have one product per expert{depends if differs else ''}; "
        "their codes are held in both forms"
    )


def _share_of_dense(match: _ExpertFFN) -> float:
    """About how long a feed-forward takes for many tokens, as a share of a dense int8 one; 0 for floats.

    That of QMoE is fitted to experts of 32 to 256 neurons, a quarter to three quarters of them active.
    """
    if match.rows and match.kernel_rows is not None:
        return match.split_share
    if not match.block or not match.exact:
        return 0.0
    neurons = match.down.args[1].meta["val"].shape[2]  # type: ignore[union-attr]
    return float(match.active / match.experts * (2.2 + 260 / neurons))


def _product_per_expert(
    editor: Editor, product: fx.Node, codes: torch.Tensor, scale: torch.Tensor
) -> fx.Node:
    """An 8-bit product outside QMoE: integer if activations are quantised per tensor or row, else by blocks."""
    x, weight, ids, *bias = product.args
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if x.target in (ours.quantize_static.default, ours.quantize_dynamic.default):
        source, *step = x.args
        args = (source, *(step or (None, None)), *weight.args[:2], ids, *bias)
        return editor.call(ours.experts_linear_rounded.default, *args, like=product)
    if _rounds_rows(x):
        args = (x.args[0], None, None, *weight.args[:2], ids, bias[0] if bias else None, True)
        return editor.call(ours.experts_linear_rounded.default, *args, like=product)
    features = codes.shape[2]
    source, block = _skip_quantization(x)
    size = block or next((size for size in BLOCKS if features % size == 0), BLOCKS[-1])
    blocks = -(-features // size)
    padded = torch.nn.functional.pad(_to_unsigned(codes), (0, blocks * size - features), value=ZERO)
    name = str(product.meta.get("site") or product.name)
    parts = {
        "blocks": padded.reshape(*codes.shape[:2], blocks, size),
        "scales": scale.unsqueeze(-1).expand(-1, -1, blocks),
    }
    readers = [
        editor.parameter(editor.fresh(f"{name}_{key}"), tensor.contiguous(), frozen=True)
        for key, tensor in parts.items()
    ]
    args = (source, *readers, ids, bias[0] if bias else None, 8, features, bool(block))
    return editor.call(ours.experts_linear_blocks.default, *args, like=product)


def _match_ffn(last: fx.Node) -> _ExpertFFN | None:
    """The feed-forward whose expert outputs `last` sums, if a kernel may support it."""
    if last.target is not aten.sum.dim_IntList or len(last.args) != 2 or last.kwargs:
        return None
    down: Any = last.args[0]
    if not _is_product(down) or (len(down.args) > 3 and down.args[3] is not None):
        return None
    if list(last.args[1]) not in ([-2], [down.meta["val"].dim() - 2]):  # type: ignore[arg-type]
        return None
    hidden, last_block = _skip_quantization(down.args[0])
    activated = _match_activation(hidden)
    if activated is None:
        return None
    activation, exact, sources = activated
    matches = tuple(_match_first(item) for item in sources)
    if any(item is None or item[0].args[2] is not down.args[2] for item in matches):
        return None
    first = [item for item in matches if item is not None]
    inputs = [_skip_quantization(product.args[0]) for product, _ in first]
    x = inputs[0][0]
    rows = all(_rounds_rows(item.args[0]) for item in (down, *(product for product, _ in first)))
    blocks = {last_block, *(block for _, block in inputs)}
    if rows:
        sizes = {
            int(item.args[1].meta["val"].shape[2]) for item in (down, *(product for product, _ in first))
        }
        blocks = {_kernel_block(sizes)}
    if len(blocks) != 1 or None in blocks:  # the kernel quantises by blocks or not at all
        return None
    if any(item is not x for item, _ in inputs) or x.meta["val"].dim() not in (2, 3):
        return None
    if down.args[2].meta["val"].dim() != x.meta["val"].dim() or not _uses_all_outputs(first):
        return None
    return _ExpertFFN(x, tuple(first), down, activation, exact, blocks.pop() or 0, rows)


def _match_activation(node: fx.Node) -> tuple[str, bool, tuple[fx.Node, ...]] | None:
    """The kernel's name of an activation, whether the kernel computes it exactly, and its inputs (gate and up, or up)."""
    if node.target is aten.mul.Tensor:
        for gate, up in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and isinstance(up, fx.Node) and gate.target is aten.silu.default:
                return "swiglu", True, (gate.args[0], up)  # type: ignore[return-value]
        return None
    if node.target is aten.gelu.default:
        return "gelu", node.kwargs.get("approximate", "none") == "tanh", (node.args[0],)  # type: ignore[return-value]
    names: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}
    name = names.get(node.target)
    return (name, True, (node.args[0],)) if name else None  # type: ignore[return-value]


def _match_first(node: fx.Node) -> tuple[fx.Node, int | None] | None:
    """The product that computes a gate or an up, and which half of its outputs that is (None: all of them)."""
    if _is_product(node):
        return node, None
    product: Any = node.args[0] if node.args else None
    if node.target is aten.slice.Tensor and _is_product(product) and len(node.args) == 4:
        size, (axis, start, stop) = product.meta["val"].shape[-1], node.args[1:]
        halves = {(0, size // 2): 0, (size // 2, size): 1}
        half = halves.get((start, min(stop, size)))  # type: ignore[arg-type, type-var]
        return (product, half) if half is not None and axis in (-1, product.meta["val"].dim() - 1) else None
    return None


def _uses_all_outputs(first: list[tuple[fx.Node, int | None]]) -> bool:
    """Whether gate and up are whole products, or the first and second half of the same one."""
    halves = [half for _, half in first]
    return halves in ([None], [None, None]) or (halves == [0, 1] and first[0][0] is first[1][0])


def _is_product(node: Any) -> bool:
    """Whether a node is an expert product with constant weights."""
    return (
        isinstance(node, fx.Node)
        and node.target is ours.experts_linear.default
        and reads_no_input(node.args[1])  # type: ignore[arg-type]
    )


def _skip_quantization(node: Any) -> tuple[fx.Node, int | None]:
    """The input of a quantisation and its block size: 0 for a node that does not quantise, None if not by blocks."""
    if node.target is ours.quantize_blocks.default:
        return node.args[0], node.args[1]
    return node, None if traits_of(node).kind is Kind.ROUNDING else 0


def _kernel_block(sizes: set[int]) -> int | None:
    """The block size by which QMoE rounds rows of some sizes best: whole rows if it can, else the fastest that divides them."""
    whole = [size for size in sizes if sizes == {size} and size in KERNEL_BLOCKS]
    return next(
        (block for block in (*whole, *KERNEL_BLOCKS) if not any(size % block for size in sizes)), None
    )


def _rounds_rows(node: Any) -> bool:
    """Whether a node rounds each row of the last axis as one block."""
    return node.target is ours.quantize_blocks.default and node.args[1] >= node.meta["val"].shape[-1]


def _pack_ffn(editor: Editor, last: fx.Node, match: _ExpertFFN) -> bool:
    """Replace a feed-forward by a kernel call if one computes the same and is the fastest form."""
    program = editor.program
    products = [node for node, _ in match.first]
    quantised = [_codes(program, node) for node in (*products, match.down)]
    name = str(match.down.meta.get("site") or last.name)
    biases = [_bias(program, node) for node in products]
    bias = None
    if any(item is not None for item in biases):
        bias = _interleave([_bias_or_zeros(item, node) for item, node in zip(biases, products)], match.first)
    routing = _routing(match)
    if routing is None:  # the kernels need distinct experts
        return False
    if not match.exact and not match.block:
        return False
    if all(item is None for item in quantised):
        split_is_faster = match.down.args[1].meta["val"].shape[0] <= MAX_SPLIT_EXPERTS  # type: ignore[union-attr]
        if match.block or split_is_faster:
            return False
        first = _interleave([evaluate(program, node.args[1]) for node in products], match.first)  # type: ignore[arg-type]
        second = evaluate(program, match.down.args[1])  # type: ignore[arg-type]
        tensors: dict[str, torch.Tensor | None] = {"first": first, "first_bias": bias, "second": second}
        _replace(
            editor, last, match, ours.mixture.default, (match.down.args[2],), name, tensors, match.activation
        )
        return True
    coded = [item for item in quantised if item is not None]
    if len(coded) != len(quantised):
        return False
    *first_coded, (second, second_scale) = coded
    first = _interleave([codes for codes, _ in first_coded], match.first)
    scale = _interleave([scales for _, scales in first_coded], match.first)
    tensors = {
        "first": _to_unsigned(first), "first_scale": _expand_scale(scale, first.shape[2], match.block), "first_bias": bias,
        "second": _to_unsigned(second), "second_scale": _expand_scale(second_scale, second.shape[2], match.block),
    }  # fmt: skip
    given = (ours.mixture_int8.default, routing, name, tensors, match.activation, match.block)
    limit, rows = match.kernel_rows, math.prod(last.meta["val"].shape[:-1])
    if limit == 0:
        return False
    if limit is None or isinstance(rows, int):  # an engine for one number of tokens has one form
        taken = limit is None or rows <= limit
        if taken:
            _replace(editor, last, match, *given)
        return taken
    few, limit = _call(editor, match, last, *given), limit * int(match.x.meta["val"].shape[-1])
    editor.replace(
        last, editor.call(ours.by_rows.default, few, last, match.x, limit, like=last, before=last.next)
    )
    return True


def _routing(match: _ExpertFFN) -> tuple[fx.Node, int] | None:
    """The scores and k of the top-k that chooses the experts; None if they are chosen in another way."""
    ids: Any = match.down.args[2]
    if ids.target is not getitem or ids.args[1] != 1 or ids.args[0].target is not aten.topk.default:
        return None
    scores, active, *options = ids.args[0].args
    experts, rank = match.down.args[1].meta["val"].shape[0], scores.meta["val"].dim()  # type: ignore[union-attr]
    highest = options[:1] in ([], [-1], [rank - 1]) and options[1:2] in ([], [True])
    return (scores, active) if highest and scores.meta["val"].shape[-1] == experts else None


def _replace(
    editor: Editor, last: fx.Node, match: _ExpertFFN, call: Callable[..., Any], routing: tuple[Any, ...], name: str,
    tensors: dict[str, torch.Tensor | None], *options: object,
) -> None:  # fmt: skip
    """Replace `last` by a call of the kernel."""
    editor.replace(last, _call(editor, match, last, call, routing, name, tensors, *options))


def _call(
    editor: Editor, match: _ExpertFFN, last: fx.Node, call: Callable[..., Any], routing: tuple[Any, ...], name: str,
    tensors: dict[str, torch.Tensor | None], *options: object,
) -> fx.Node:  # fmt: skip
    """A call of the kernel in front of `last`; the tensors become parameters."""
    readers = [
        None
        if tensor is None
        else editor.parameter(editor.fresh(f"{name}_{key}"), tensor.contiguous(), frozen=True)
        for key, tensor in tensors.items()
    ]
    return editor.call(call, match.x, *routing, *readers, *options, like=match.down, before=last)


def _codes(program: Program, product: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes i8[E, O, I] and scales f[E, O] of a weight; None if it is not 8-bit with one scale per output."""
    weight: Any = product.args[1]
    if weight.target is not ours.dequantize.default or weight.args[2] != 1:
        return None
    codes, scale = (evaluate(program, item) for item in weight.args[:2])
    return (codes, scale) if scale.dim() == 2 else None


def _bias(program: Program, product: fx.Node) -> torch.Tensor | None:
    bias = product.args[3] if len(product.args) > 3 else None
    return evaluate(program, bias) if isinstance(bias, fx.Node) else None


def _bias_or_zeros(bias: torch.Tensor | None, product: fx.Node) -> torch.Tensor:
    if bias is not None:
        return bias
    weight: Any = product.args[1]
    value = weight.meta["val"]
    return torch.zeros(value.shape[:2], dtype=value.dtype)


def _interleave(parts: list[torch.Tensor], first: tuple[tuple[fx.Node, int | None], ...]) -> torch.Tensor:
    """Interleave the rows of gate and up, as the kernels expect; rows of up alone stay as they are."""
    if len(first) == 1:
        return parts[0]
    gate, up = parts if first[0][1] is None else parts[0].chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2)


def _to_unsigned(codes: torch.Tensor) -> torch.Tensor:
    """i8 codes around 0 as u8 codes around ZERO."""
    return (codes.to(torch.int16) + ZERO).to(torch.uint8)


def _expand_scale(scale: torch.Tensor, size: int, block: int) -> torch.Tensor:
    """f[E, O] -> f[E, O, size / block]: repeat each output's scale for every block of its `size` inputs."""
    return scale.unsqueeze(2).expand(-1, -1, size // block) if block else scale
