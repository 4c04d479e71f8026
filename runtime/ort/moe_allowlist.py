"""Check calls of ONNX Runtime's MoE kernels, which read scales without checking how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmgraph.errors import BundleError

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

MIXTURES = frozenset({"MoE", "QMoE"})

_ATTRIBUTES = frozenset(
    {"k", "activation_type", "normalize_routing_weights", "swiglu_fusion", "activation_alpha", "activation_beta",
     "expert_weight_bits", "block_size"}
)  # fmt: skip
"""The attributes that our backend emits; others select layouts that the kernel does not check."""

_CODES_AND_SCALES = ((2, 3), (5, 6))
"""Pairs of input indices of QMoE: quantized codes and their scales."""


def check_mixture(node: NodeProto, weights: dict[str, TensorProto]) -> None:
    """Raise BundleError unless the attributes are allowed and a QMoE node's codes and scales have matching shapes.

    codes [experts, outputs, inputs] and scales [experts, outputs(, inputs / block_size)] must be weights of the file: the
    kernel reads one scale per block of inputs, beyond the end if there are too few.
    """
    attributes = {item.name: item.i for item in node.attribute}
    unknown = sorted(set(attributes) - _ATTRIBUTES)
    if unknown:
        raise BundleError(f"node {node.name!r} ({node.op_type}) sets {unknown[0]!r}, which is not allowed")
    if node.op_type != "QMoE":
        return
    block = attributes.get("block_size", 0)
    if attributes.get("expert_weight_bits") != 8 or block < 0:
        raise BundleError(
            f"node {node.name!r} (QMoE) must have 8-bit weights and a block size of 0 or more, not {block}"
        )
    for indices in _CODES_AND_SCALES:
        pair = [weights.get(node.input[index]) if index < len(node.input) else None for index in indices]
        codes, scales = (list(item.dims) if item is not None else [] for item in pair)
        if len(codes) != 3 or (block and codes[2] % block):
            raise BundleError(
                f"node {node.name!r} (QMoE) has codes of shape {codes} with a block size of {block}"
            )
        expected = codes[:2] + ([codes[2] // block] if block else [])
        if scales != expected:
            raise BundleError(f"node {node.name!r} (QMoE) has scales of shape {scales}, not {expected}")
