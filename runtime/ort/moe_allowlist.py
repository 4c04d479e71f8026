"""What a call of ONNX Runtime's kernels for mixtures of experts may look like: they trust what they are told of scales."""

from __future__ import annotations

from typing import Any

from bmgraph.errors import BundleError

MIXTURES = frozenset({"MoE", "QMoE"})

ATTRIBUTES = frozenset(
    {"k", "activation_type", "normalize_routing_weights", "swiglu_fusion", "activation_alpha", "activation_beta",
     "expert_weight_bits", "block_size"}
)  # fmt: skip
"""The attributes that we emit: others choose layouts that the kernel does not check."""

SCALED = ((2, 3), (5, 6))
"""Places of a quantised kernel's codes, and of their scales."""


def check_mixture(node: Any, weights: dict[str, Any]) -> None:
    """Raise BundleError unless the codes and scales of a quantised mixture are weights of the file that fit each other.

    The kernel reads a scale for every block of inputs, and beyond the end of scales that are too few.
    """
    numbers = {item.name: item.i for item in node.attribute}
    foreign = sorted(set(numbers) - ATTRIBUTES)
    if foreign:
        raise BundleError(f"node {node.name!r} ({node.op_type}) sets {foreign[0]!r}, which is not admitted")
    if node.op_type != "QMoE":
        return
    block = numbers.get("block_size", 0)
    if numbers.get("expert_weight_bits") != 8 or block < 0:
        raise BundleError(
            f"node {node.name!r} (QMoE) has weights that are not of 8 bits, or a block of {block}"
        )
    for places in SCALED:
        found = [weights.get(node.input[place]) if place < len(node.input) else None for place in places]
        codes, scales = (list(item.dims) if item is not None else [] for item in found)
        if len(codes) != 3 or (block and codes[2] % block):
            raise BundleError(f"node {node.name!r} (QMoE) has codes of shape {codes}, in blocks of {block}")
        wanted = codes[:2] + ([codes[2] // block] if block else [])
        if scales != wanted:
            raise BundleError(f"node {node.name!r} (QMoE) has scales of shape {scales}, not {wanted}")
