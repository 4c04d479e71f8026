"""Schemas of ONNX Runtime's contrib operators (domain com.microsoft), limited to the inputs and attributes in use."""

from __future__ import annotations

from typing import Any

import onnx.defs

DOMAIN = "com.microsoft"

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def multi_head_attention() -> Any:
    """MultiHeadAttention(query, key, value, bias?, key_padding_mask?): query, key and value f[B, S, H * d]."""
    return _operator(
        "MultiHeadAttention",
        "query:T key:T value:T bias:T? key_padding_mask:M?",
        {"T": FLOATS, "M": ["tensor(int32)"]},
        {"num_heads": "INT", "scale": "FLOAT", "unidirectional": "INT", "mask_filter_value": "FLOAT"},
    )


def matmul_integer_to_float() -> Any:
    """MatMulIntegerToFloat(rows, matrix, row_scale, scale, row_zero_point?, zero_point?, bias?): 8-bit times 8-bit."""
    return _operator(
        "MatMulIntegerToFloat",
        "rows:A matrix:B row_scale:T scale:T row_zero_point:A? zero_point:B? bias:T?",
        {"T": FLOATS, "A": ["tensor(uint8)", "tensor(int8)"], "B": ["tensor(uint8)", "tensor(int8)"]},
        {},
    )


def matmul_nbits() -> Any:
    """MatMulNBits(rows, codes, scales, zero_points?, group?, bias?): float rows times block-quantised codes."""
    return _operator(
        "MatMulNBits",
        "rows:T codes:Q scales:T zero_points:Q? group:G? bias:T?",
        {"T": FLOATS, "Q": ["tensor(uint8)"], "G": ["tensor(int32)"]},
        dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), "INT"),
    )


def gather_block_quantized() -> Any:
    """GatherBlockQuantized(codes, ids, scales, zero_points?): rows of a block-quantised table."""
    return _operator(
        "GatherBlockQuantized",
        "codes:Q ids:I scales:T zero_points:Q?",
        {"T": FLOATS, "Q": ["tensor(uint8)"], "I": ["tensor(int32)", "tensor(int64)"]},
        dict.fromkeys(("gather_axis", "quantize_axis", "block_size", "bits"), "INT"),
    )


MOE_ATTRIBUTES = {
    "k": "INT", "activation_type": "STRING", "normalize_routing_weights": "INT", "swiglu_fusion": "INT",
    "activation_alpha": "FLOAT", "activation_beta": "FLOAT",
}  # fmt: skip


def moe() -> Any:
    """MoE(input, router_probs, fc1, fc1_bias?, fc2): expert feed-forwards, weighted by softmax(router_probs)."""
    return _operator("MoE", "input:T router_probs:T fc1:T fc1_bias:T? fc2:T", {"T": FLOATS}, MOE_ATTRIBUTES)


def qmoe() -> Any:
    """QMoE(input, router_probs, fc1, fc1_scales, fc1_bias?, fc2, fc2_scales, ..., router_weights): `moe` with integer
    weights; router_probs select experts, router_weights weight them."""
    unused = " ".join(f"absent_{count}:T?" for count in range(7))
    return _operator(
        "QMoE",
        f"input:T router_probs:T fc1:Q fc1_scales:T fc1_bias:T? fc2:Q fc2_scales:T {unused} router_weights:T",
        {"T": FLOATS, "Q": ["tensor(uint8)"]},
        {**MOE_ATTRIBUTES, "expert_weight_bits": "INT", "block_size": "INT"},
    )


def _operator(name: str, inputs: str, types: dict[str, list[str]], attributes: dict[str, str]) -> Any:
    """An operator; `inputs` lists `name:type`, with a question mark after the type of an optional input."""
    from onnxscript.values import Op, Opset

    schema = onnx.defs.OpSchema
    option = schema.FormalParameterOption
    named = [item.partition(":") for item in inputs.split()]
    declared = schema(
        name,
        DOMAIN,
        1,
        inputs=[
            schema.FormalParameter(
                label,
                kind.rstrip("?"),
                param_option=option.Optional if kind.endswith("?") else option.Single,
            )
            for label, _, kind in named
        ],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[(label, allowed, label) for label, allowed in types.items()],
        attributes=[
            schema.Attribute(label, getattr(schema.AttrType, kind), required=False)
            for label, kind in attributes.items()
        ],
    )
    return Op(Opset(DOMAIN, 1), name, declared)
