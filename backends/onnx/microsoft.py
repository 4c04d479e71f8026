"""Schemas of ONNX Runtime's own operators (domain com.microsoft), as far as the translation emits them."""

from __future__ import annotations

from typing import Any

import onnx.defs

DOMAIN = "com.microsoft"


def multi_head_attention() -> Any:
    """MultiHeadAttention(query, key, value, bias?, key_padding_mask?) on packed rows."""
    from onnxscript.values import Op, Opset

    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    parameter, attribute, kind = schema.FormalParameter, schema.Attribute, schema.AttrType
    declared = schema(
        "MultiHeadAttention",
        DOMAIN,
        1,
        inputs=[
            parameter("query", "T"),
            parameter("key", "T"),
            parameter("value", "T"),
            parameter("bias", "T", param_option=optional),
            parameter("key_padding_mask", "M", param_option=optional),
        ],
        outputs=[parameter("output", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "values"),
            ("M", ["tensor(int32)"], "mask"),
        ],
        attributes=[
            attribute("num_heads", kind.INT, required=True),
            attribute("scale", kind.FLOAT, required=False),
            attribute("unidirectional", kind.INT, required=False),
        ],
    )
    return Op(Opset(DOMAIN, 1), "MultiHeadAttention", declared)
