"""ONNX graph rewrites, each on a small hand-built model: golden text, numerics, no match."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from bmgraph.backends.onnx.rewrite_pipeline import REWRITES, optimise
from bmgraph.backends.onnx.rewrites.contrib_gelu import use_fast_gelu
from bmgraph.backends.onnx.rewrites.drop_clip import drop_clips
from bmgraph.backends.onnx.rewrites.fuse_integer_matmul import fuse_integer_products
from bmgraph.backends.onnx.rewrites.fuse_rotary import use_rotary
from bmgraph.backends.onnx.rewrites.gather_to_matmul import MAX_COLUMNS, pick_by_product
from bmgraph.backends.onnx.rewrites.graph_utils import PROVENANCE, remove_dead
from bmgraph.backends.onnx.rewrites.padding_as_feature import fold_padding
from bmgraph.backends.onnx.rewrites.quantize_before_concat import round_before_concat
from bmgraph.backends.onnx.rewrites.share_kv_heads import share_heads

STAMP = {"bmgraph.site": "layers.0", "bmgraph.pass": "quantize", "bmgraph.node": "linear"}


K, N, HEADS = 12, 8, 2
STEP, ZERO = np.float32(0.02), np.uint8(120)


def build(text: str, **arrays: np.ndarray) -> ir.Model:
    """A model from the text form of its graph; every node has a site and a pass in its metadata."""
    head = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
    proto = onnx.parser.parse_model(head + text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node in model.graph:
        node.metadata_props.update(STAMP)
    return model


def listing(model: ir.Model) -> list[str]:
    """One line per node, as `Operator(inputs)`."""
    return [
        f"{node.op_type}({', '.join('-' if value is None else str(value.name) for value in node.inputs)})"
        for node in model.graph
    ]


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    """The first output, on one thread, with ONNX Runtime's own optimizations off."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def rewritten(
    rewrite: Callable[[ir.Model], int], text: str, arrays: dict[str, np.ndarray], feeds: dict[str, np.ndarray]
) -> tuple[int, ir.Model, np.ndarray, np.ndarray]:
    """The number of rewrites, the new model, and the model's output before and after."""
    before = run(build(text, **arrays), **feeds)
    model = build(text, **arrays)
    count = rewrite(model)
    remove_dead(model.graph)
    for node in model.graph:
        assert {key: node.metadata_props.get(key) for key in STAMP} == STAMP, node.op_type
    return count, model, before, run(model, **feeds)


def unchanged(rewrite: Callable[[ir.Model], int], text: str, **arrays: np.ndarray) -> None:
    model = build(text, **arrays)
    before = listing(model)
    assert rewrite(model) == 0
    assert listing(model) == before


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return rng().normal(size=shape).astype(np.float32)


def codes(*shape: int) -> np.ndarray:
    return rng().integers(-127, 128, size=shape).astype(np.int8)


def scales(size: int) -> np.ndarray:
    return rng().uniform(0.005, 0.02, size=size).astype(np.float32)


# --- integer products ---------------------------------------------------------------------------------------------

ACTIVATION = """
    q = QuantizeLinear(x, step, zero)
    d = DequantizeLinear(q, step, zero)
"""
LINEAR = f"""toy (float[B, S, {K}] x) => (float[B, S, {N}] y) {{{ACTIVATION}
    w = DequantizeLinear <axis: int = 0> (codes, scale)
    t = Transpose <perm: ints = [1, 0]> (w)
    p = MatMul(d, t)
    y = Add(p, bias)
}}"""
DYNAMIC = LINEAR.replace("q = QuantizeLinear(x, step, zero)", "q, step, zero = DynamicQuantizeLinear(x)")


def linear_arrays(**more: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "step": np.array(STEP),
        "zero": np.array(ZERO),
        "codes": codes(N, K),
        "scale": scales(N),
        "bias": floats(N),
        **more,
    }


def test_product_is_fused_with_its_bias_and_packed_weight() -> None:
    arrays = linear_arrays()
    count, model, before, after = rewritten(fuse_integer_products, LINEAR, arrays, {"x": floats(2, 3, K)})
    assert count == 1
    assert listing(model) == [
        "QuantizeLinear(x, step, zero)",
        "MatMulIntegerToFloat(q, codes_packed, step, codes_scale, zero, -, bias)",
    ]
    packed = model.graph.initializers["codes_packed"].const_value
    assert packed is not None
    np.testing.assert_array_equal(packed.numpy(), arrays["codes"].T)
    assert "codes" not in model.graph.initializers
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_product_with_scales_found_at_run_time_is_fused() -> None:
    arrays = linear_arrays()
    del arrays["step"], arrays["zero"]
    count, model, before, after = rewritten(fuse_integer_products, DYNAMIC, arrays, {"x": floats(2, 3, K)})
    assert count == 1
    assert [line.split("(")[0] for line in listing(model)] == [
        "DynamicQuantizeLinear",
        "MatMulIntegerToFloat",
    ]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("swapped", [False, True])
def test_product_without_a_transpose_keeps_the_layout_of_its_weight(swapped: bool) -> None:
    text = f"""toy (float[B, {K}] x) => (float[B, {N}] y) {{{ACTIVATION}
        w = DequantizeLinear <axis: int = {0 if swapped else 1}> (codes, scale)
        y = {f"Gemm <transB: int = {int(swapped)}> (d, w, bias)" if swapped else "MatMul(d, w)"}
    }}"""
    arrays = linear_arrays(codes=codes(N, K) if swapped else codes(K, N))
    if not swapped:
        del arrays["bias"]
    count, model, before, after = rewritten(fuse_integer_products, text, arrays, {"x": floats(5, K)})
    assert count == 1
    assert listing(model)[-1] == (
        f"MatMulIntegerToFloat(q, codes_packed, step, codes_scale, zero, -, {'bias' if swapped else '-'})"
    )
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_one_weight_read_twice_is_packed_once() -> None:
    text = LINEAR.replace("y = Add(p, bias)", "t2 = MatMul(d, t)\n a = Add(p, bias)\n y = Sub(a, t2)")
    count, model, before, after = rewritten(
        fuse_integer_products, text, linear_arrays(), {"x": floats(2, 3, K)}
    )
    assert count == 2
    assert sorted(model.graph.initializers) == ["bias", "codes_packed", "codes_scale", "step", "zero"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_codes_read_in_both_layouts_are_packed_for_each() -> None:
    text = f"""toy (float[B, {K}] x) => (float[B, {K}] y) {{{ACTIVATION}
        w = DequantizeLinear <axis: int = 0> (codes, scale)
        t = Transpose <perm: ints = [1, 0]> (w)
        u = DequantizeLinear <axis: int = 1> (codes, other)
        p = MatMul(d, t)
        r = MatMul(d, u)
        y = Add(p, r)
    }}"""
    arrays = linear_arrays(codes=codes(K, K), scale=scales(K), other=2 * scales(K))
    del arrays["bias"]
    count, _, before, after = rewritten(fuse_integer_products, text, arrays, {"x": floats(5, K)})
    assert count == 2
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_bias_read_by_others_before_it_is_added_stays_outside() -> None:
    text = LINEAR.replace("y = Add(p, bias)", "a = Add(p, bias)\n y = Mul(a, p)")
    count, model, before, after = rewritten(
        fuse_integer_products, text, linear_arrays(), {"x": floats(2, 3, K)}
    )
    assert count == 1
    assert listing(model)[1:] == [
        "MatMulIntegerToFloat(q, codes_packed, step, codes_scale, zero, -, -)",
        "Add(p, bias)",
        "Mul(a, p)",
    ]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "more"),
    [
        ("MatMul(d, t)", "MatMul(x, t)", {}),
        ("", "", {"zero": np.array(3, np.int8)}),
        ("<axis: int = 0>", "<axis: int = 1>", {"codes": codes(K, K), "scale": scales(K), "bias": floats(K)}),
        ("DequantizeLinear <axis: int = 0> (codes, scale)", "Identity(table)", {"table": floats(N, K)}),
        ("(codes, scale)", "(codes, scale, offset)", {"offset": np.zeros(N, np.int8)}),
        ("", "", {"codes": codes(N, K).view(np.uint8)}),
        pytest.param(
            "perm: ints = [1, 0]",
            "perm: ints = [0, 1]",
            {},
        ),
    ],
    ids=["float", "signed", "axis", "float weight", "weight offset", "unsigned weight", "not swapped"],
)
def test_other_products_are_left(old: str, new: str, more: dict[str, np.ndarray]) -> None:
    text = LINEAR.replace(old, new) if old else LINEAR
    if "zero" in more or "codes" in more:
        text = text.replace(f"float[B, S, {N}] y", "float[B, S, M] y")
    unchanged(fuse_integer_products, text, **linear_arrays(**more))


@pytest.mark.parametrize(
    ("attributes", "bias"),
    [
        ("transB: int = 1, alpha: float = 0.5", floats(N)),
        ("transB: int = 1, beta: float = 0.5", floats(N)),
        pytest.param(
            "transB: int = 1",
            floats(1),
        ),
        pytest.param(
            "transB: int = 1",
            floats(1, N),
        ),
    ],
    ids=["alpha", "beta", "one number", "row"],
)
def test_gemm_which_the_integer_product_cannot_say_is_left(attributes: str, bias: np.ndarray) -> None:
    text = f"""toy (float[B, {K}] x) => (float[B, {N}] y) {{{ACTIVATION}
        w = DequantizeLinear <axis: int = 0> (codes, scale)
        y = Gemm <{attributes}> (d, w, bias)
    }}"""
    unchanged(fuse_integer_products, text, **linear_arrays(bias=bias))


# --- clips --------------------------------------------------------------------------------------------------------

CLIP = """toy (float[B, 4] x) => (float[B, 4] y) {
    c = Clip(x, low, high)
    q = QuantizeLinear(c, step, zero)
    y = DequantizeLinear(q, step, zero)
}"""


def clip_arrays(low: float, high: float, kind: type = np.uint8, zero: int = 120) -> dict[str, np.ndarray]:
    return {
        "low": np.array(low, np.float32),
        "high": np.array(high, np.float32),
        "step": np.array(STEP),
        "zero": np.array(zero, kind),
    }


@pytest.mark.parametrize(
    ("kind", "zero", "first", "last"),
    [
        (np.uint8, 120, 0, 255),
        pytest.param(
            np.int8,
            5,
            -128,
            127,
        ),
    ],
    ids=["u8", "s8"],
)
def test_clip_at_the_ends_of_a_rounding_goes(kind: type, zero: int, first: int, last: int) -> None:
    arrays = clip_arrays((first - zero) * float(STEP), (last - zero) * float(STEP), kind, zero)
    feeds = {"x": 10 * floats(6, 4)}
    assert np.abs(feeds["x"]).max() > 256 * STEP
    count, model, before, after = rewritten(drop_clips, CLIP, arrays, feeds)
    assert count == 1
    assert listing(model) == ["QuantizeLinear(x, step, zero)", "DequantizeLinear(q, step, zero)"]
    np.testing.assert_array_equal(after, before)


def test_clip_without_a_lower_bound_goes() -> None:
    arrays = clip_arrays(0.0, 135 * float(STEP))
    del arrays["low"]
    text = CLIP.replace("Clip(x, low, high)", 'Clip(x, "", high)')
    count, _, before, after = rewritten(drop_clips, text, arrays, {"x": 10 * floats(6, 4)})
    assert count == 1
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("kind", "zero", "low", "high"),
    [
        (np.uint8, 120, -120, 134),
        (np.uint8, 120, -119, 135),
        pytest.param(
            np.int8,
            0,
            0,
            127,
        ),
        pytest.param(
            np.uint16,
            120,
            -120,
            135,
        ),
    ],
    ids=["upper", "lower", "s8 lower", "u16"],
)
def test_clip_that_changes_codes_stays(kind: type, zero: int, low: int, high: int) -> None:
    unchanged(drop_clips, CLIP, **clip_arrays(low * float(STEP), high * float(STEP), kind, zero))


def test_clip_before_a_rounding_without_a_zero_point_stays() -> None:
    text = CLIP.replace(", step, zero)", ", step)")
    arrays = clip_arrays(0.0, 200 * float(STEP))
    unchanged(drop_clips, text, **arrays)


# --- concatenations -----------------------------------------------------------------------------------------------

CONCAT = """toy (float[B, 4] x, float[B, 6] z) => (float[B, 10] y) {
    c = Concat <axis: int = 1> (x, z)
    q = QuantizeLinear(c, step, zero)
    y = DequantizeLinear(q, step, zero)
}"""
ROUNDING: dict[str, np.ndarray] = {"step": np.array(STEP), "zero": np.array(ZERO)}


def test_rounding_moves_in_front_of_the_concatenation() -> None:
    feeds = {"x": floats(3, 4), "z": floats(3, 6)}
    count, model, before, after = rewritten(round_before_concat, CONCAT, ROUNDING, feeds)
    assert count == 1
    assert listing(model) == [
        "QuantizeLinear(x, step, zero)",
        "QuantizeLinear(z, step, zero)",
        "Concat(x_codes_of_q, z_codes_of_q)",
        "DequantizeLinear(q, step, zero)",
    ]
    np.testing.assert_array_equal(after, before)


def test_rounding_stays_behind_a_concatenation_that_others_read() -> None:
    text = CONCAT.replace("y = Deq", "e = Deq").replace("zero)\n}", "zero)\n y = Add(e, c)\n}")
    assert "Add" in text
    unchanged(round_before_concat, text, **ROUNDING)


def test_rounding_with_a_scale_for_each_channel_stays() -> None:
    arrays = {"step": np.full(10, STEP), "zero": np.full(10, ZERO)}
    unchanged(round_before_concat, CONCAT, **arrays)


def test_rounding_without_a_zero_point_moves_too() -> None:
    text = CONCAT.replace(", step, zero)", ", step)")
    feeds = {"x": floats(3, 4), "z": floats(3, 6)}
    count, model, before, after = rewritten(round_before_concat, text, {"step": ROUNDING["step"]}, feeds)
    assert count == 1
    assert listing(model)[0] == "QuantizeLinear(x, step)"
    np.testing.assert_array_equal(after, before)


# --- activations --------------------------------------------------------------------------------------------------


def test_exact_gelu_takes_the_operator_of_the_engine() -> None:
    text = "toy (float[B, 4] x) => (float[B, 4] y) { y = Gelu(x) }"
    count, model, before, after = rewritten(use_fast_gelu, text, {}, {"x": floats(50, 4)})
    assert count == 1
    assert [(node.domain, node.op_type) for node in model.graph] == [("com.microsoft", "Gelu")]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_first_use_of_the_domain_is_declared() -> None:
    model = build("toy (float[B, 4] x) => (float[B, 4] y) { y = Gelu(x) }")
    del model.graph.opset_imports["com.microsoft"]
    use_fast_gelu(model)
    assert model.opset_imports["com.microsoft"] == 1


@pytest.mark.parametrize("node", ['Gelu <approximate = "tanh"> (x)', "com.microsoft.Gelu(x)", "Erf(x)"])
def test_other_activations_are_left(node: str) -> None:
    unchanged(use_fast_gelu, f"toy (float[B, 4] x) => (float[B, 4] y) {{ y = {node} }}")


# --- columns ------------------------------------------------------------------------------------------------------

COLUMNS = """toy (float[B, S, 16] x) => (float[B, S, M] y) {
    s = Softmax(x)
    h = Relu(s)
    y = Gather <axis: int = -1> (h, index)
}"""


@pytest.mark.parametrize("index", [[3], [15, 0, 7], [-1, 2, 2]], ids=["one", "some", "negative and repeated"])
def test_few_columns_are_picked_by_a_product(index: list[int]) -> None:
    arrays = {"index": np.array(index, np.int64)}
    count, model, before, after = rewritten(pick_by_product, COLUMNS, arrays, {"x": floats(2, 3, 16)})
    assert count == 1
    assert listing(model) == ["Softmax(x)", "Relu(s)", "MatMul(h, y_choice)"]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    "node", ["Relu(x)", "Log(x)", "Add(x, hidden)", "Sigmoid(x)", "Sin(x)", "Softmax <axis: int = 1> (x)"]
)
def test_columns_of_what_may_be_infinite_are_not_picked_by_a_product(node: str) -> None:
    text = COLUMNS.replace("Softmax(x)", node)
    unchanged(pick_by_product, text, index=np.array([0]), hidden=np.full(16, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("old", "new", "index"),
    [
        ("axis: int = -1", "axis: int = 1", np.array([0, 1])),
        ("float[", "int32[", np.array([0, 1])),
        ("", "", np.zeros(MAX_COLUMNS + 1, np.int64)),
        ("", "", np.array([[0, 1]])),
        ("", "", np.array(2)),
        ("float[B, S, 16] x", "float[B, S, C] x", np.array([0, 1])),
    ],
    ids=["rows", "integers", "many", "table", "one without its axis", "unknown width"],
)
def test_other_gathers_are_left(old: str, new: str, index: np.ndarray) -> None:
    text = COLUMNS.replace(old, new) if old else COLUMNS
    if index.ndim != 1 or "axis: int = 1" in text:
        text = text.replace("[B, S, M] y", "[] y").replace("float[] y", "float y")
    unchanged(pick_by_product, text, index=index)


# --- padding ------------------------------------------------------------------------------------------------------

ATTEND = f"""toy (float[B, S, {K}] x, int32[B, S] mask) => (float[B, S, {N}] y) {{
    qp = MatMul(x, wq)
    q = Add(qp, bq)
    kp = MatMul(x, wk)
    k = Add(bk, kp)
    v = MatMul(x, wv)
    y = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}> (q, k, v, "", mask)
}}"""
RAGGED = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]], np.int32)


def attention_arrays(**more: np.ndarray) -> dict[str, np.ndarray]:
    wq, wk, wv = np.split(floats(K, 3 * N) / 2, 3, 1)
    return {"wq": wq, "wk": wk, "wv": wv, "bq": floats(2 * N)[:N], "bk": floats(2 * N)[N:], **more}


def attend_feeds() -> dict[str, np.ndarray]:
    return {"x": floats(3, 5, K), "mask": RAGGED}


def test_padding_becomes_a_feature_of_queries_and_keys() -> None:
    count, model, before, after = rewritten(fold_padding, ATTEND, attention_arrays(), attend_feeds())
    assert count == 1
    assert listing(model) == [
        "MatMul(x, wq_wide)",
        "Add(qp, bq_wide)",
        "MatMul(x, wk_wide)",
        "Add(bk_wide, kp)",
        "MatMul(x, wv)",
        "Equal(mask, padding_zero)",
        "Cast(padding_equal_mask_2_4)",
        "Unsqueeze(padding_cast_mask_2_4, padding_axis)",
        "Mul(padding_unsqueeze_mask_2_4, padding_pattern)",
        "Add(k, padding_mul_mask_2_4)",
        "MultiHeadAttention(q, k_or_padding, v, -, -)",
    ]
    node = list(model.graph)[-1]
    assert node.attributes.get_float("scale") == pytest.approx(
        0.5
    )  # for 4 features, not for the 5 after padding
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_padding_is_folded_where_projections_have_no_bias() -> None:
    text = ATTEND.replace("qp =", "q =").replace("kp =", "k =")
    text = text.replace("q = Add(qp, bq)", "").replace("k = Add(bk, kp)", "")
    arrays = attention_arrays()
    del arrays["bq"], arrays["bk"]
    count, _, before, after = rewritten(fold_padding, text, arrays, attend_feeds())
    assert count == 1
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_padding_is_folded_into_integer_products() -> None:
    sides = "".join(
        f"""
        w{side} = DequantizeLinear <axis: int = 0> (codes{side}, scale{side})
        t{side} = Transpose <perm: ints = [1, 0]> (w{side})
        {side}{"p" if bias else "r"} = MatMul(d, t{side})
        {f"{side}r = Add({side}p, bias)" if bias else ""}"""
        for side, bias in (("q", True), ("k", False), ("v", True))
    )
    text = f"""toy (float[B, S, {K}] x, int32[B, S] mask) => (float[B, S, {N}] y) {{{ACTIVATION}{sides}
        y = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}, scale: float = 0.3> (qr, kr, vr, "", mask)
    }}"""
    arrays = {**ROUNDING, "bias": floats(N)}
    for place, side in enumerate("qkv"):
        arrays[f"codes{side}"] = np.roll(codes(N, K), place, 0)
        arrays[f"scale{side}"] = np.roll(scales(N), place)
    before = run(build(text, **arrays), **attend_feeds())
    model = build(text, **arrays)
    done = {item.name: item.count for item in optimise(model)}
    assert done == {"fuse_integer_products": 3, "fold_padding": 1}
    np.testing.assert_allclose(run(model, **attend_feeds()), before, rtol=1e-4, atol=1e-5)


def test_row_has_the_same_bits_beside_any_neighbours() -> None:
    model = build(ATTEND, **attention_arrays())
    assert fold_padding(model) == 1
    feeds = attend_feeds()
    together = run(model, **feeds)
    for row in range(len(RAGGED)):
        alone = run(model, x=feeds["x"][row : row + 1], mask=RAGGED[row : row + 1])
        np.testing.assert_array_equal(alone[0], together[row])


def test_layers_of_one_shape_share_the_penalty() -> None:
    text = f"""toy (float[B, S, {N}] x, int32[B, S] mask) => (float[B, S, {N}] y) {{
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        h = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}> (q, k, x, "", mask)
        q2 = MatMul(h, uq)
        k2 = MatMul(h, uk)
        y = com.microsoft.MultiHeadAttention <num_heads: int = {HEADS}> (q2, k2, h, "", mask)
    }}"""
    arrays = {
        name: floats(N, 4 * N)[:, place * N : (place + 1) * N] / 2
        for place, name in enumerate(("wq", "wk", "uq", "uk"))
    }
    feeds = {"x": floats(3, 5, N), "mask": RAGGED}
    count, model, before, after = rewritten(fold_padding, text, arrays, feeds)
    assert count == 2
    assert sum(node.op_type == "Equal" for node in model.graph) == 1
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('(q, k, v, "", mask)', "(q, k, v)"),
        ('(q, k, v, "", mask)', '(q, k, v, "", mask, shift)'),
        ('(q, k, v, "", mask)', "(q, k, v, joint, mask)"),
        ("num_heads: int = 2", "num_heads: int = 2, unidirectional: int = 1"),
        ('(q, k, v, "", mask)', '(q, q, v, "", mask)'),
        ("MatMul(x, wk)", "MatMul(x, wq)"),
        ("k = Add(bk, kp)", "k = Mul(bk, kp)"),
        ("v = MatMul(x, wv)", "v = Add(k, k)"),
        pytest.param("k = Add(bk, kp)", "k = Add(one, kp)",),
    ],
    ids=[
        "no mask", "shifted scores", "joint bias", "causal", "one projection", "one matrix", "no projection",
        "keys read twice", "bias of one number",
    ],
)  # fmt: skip
def test_other_attention_is_left(old: str, new: str) -> None:
    text = ATTEND.replace(old, new)
    assert text != ATTEND
    arrays = attention_arrays(joint=floats(3 * N), shift=np.zeros((1, 1, 5, 5), np.float32), one=floats(1))
    unchanged(fold_padding, text, **arrays)


# --- all of them --------------------------------------------------------------------------------------------------


def test_every_rewrite_reports_its_sites_and_keeps_the_outputs() -> None:
    text = f"""toy (float[B, S, {K}] x) => (float[B, S, 2] y) {{
        c = Clip(x, low, high)
        {ACTIVATION.replace("x, step", "c, step")}
        w = DequantizeLinear <axis: int = 0> (codes, scale)
        t = Transpose <perm: ints = [1, 0]> (w)
        p = MatMul(d, t)
        a = Add(p, bias)
        g = Gelu(a)
        y = Gather <axis: int = -1> (g, index)
    }}"""
    bounds = {"low": np.array(-120 * STEP, np.float32), "high": np.array(135 * STEP, np.float32)}
    arrays = linear_arrays(index=np.array([5, 1]), **bounds)
    before = run(build(text, **arrays), x=4 * floats(2, 3, K))
    model = build(text, **arrays)
    assert [(item.name, item.count) for item in optimise(model)] == [
        ("drop_clips", 1),
        ("fuse_integer_products", 1),
        ("use_fast_gelu", 1),
        ("pick_by_product", 1),
    ]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model, x=4 * floats(2, 3, K)), before, rtol=1e-5, atol=1e-5)
    assert optimise(model) == []


def test_model_without_a_match_is_left_untouched() -> None:
    text = (
        f"toy (float[B, {K}] x) => (float[B, {N}] y) {{ p = MatMul(x, w)\n s = Sigmoid(p)\n y = Mul(p, s) }}"
    )
    model = build(text, w=floats(K, N))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert optimise(model) == []
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_where_two_passes_meet_the_last_replaced_node_is_named() -> None:
    model = build(LINEAR, **linear_arrays())
    for node in model.graph:
        node.metadata_props["bmgraph.site"] = f"site of {node.op_type}"
        node.metadata_props["other"] = "not kept"
    fuse_integer_products(model)
    fused = next(node for node in model.graph if node.op_type == "MatMulIntegerToFloat")
    assert fused.metadata_props["bmgraph.site"] == "site of Add"
    assert set(fused.metadata_props) <= set(PROVENANCE)


def test_rewrites_have_one_name_each() -> None:
    assert [name for name, _ in REWRITES] == [rewrite.__name__ for _, rewrite in REWRITES]


SHARED = """
attend (float[3, 4, 2, 8] q, float[3, 2, 5, 8] k, float[3, 2, 5, 8] v) => (float[3, 4, 2, 8] y)
{
   k1 = Unsqueeze(k, axis)
   k2 = Expand(k1, spread)
   k3 = Reshape(k2, joined)
   v1 = Unsqueeze(v, axis)
   v2 = Expand(v1, spread)
   v3 = Reshape(v2, joined)
   y = Attention(q, k3, v3)
}
"""


def heads_arrays(axis: int = 2) -> dict[str, np.ndarray]:
    return {
        "axis": np.array([axis]),
        "spread": np.array([3, 2, 2, 5, 8]),
        "joined": np.array([3, 4, 5, 8]),
    }


def test_heads_are_shared_instead_of_repeated() -> None:
    feeds = {"q": floats(3, 4, 2, 8), "k": floats(3, 2, 5, 8), "v": floats(3, 2, 5, 8)}
    count, model, before, after = rewritten(share_heads, SHARED, heads_arrays(), feeds)
    assert count == 1
    assert listing(model) == ["Attention(q, k, v)"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_one_head_is_shared_by_all() -> None:
    text = """
attend (float[3, 4, 2, 8] q, float[3, 1, 5, 8] k, float[3, 1, 5, 8] v) => (float[3, 4, 2, 8] y)
{
   k1 = Expand(k, joined)
   v1 = Expand(v, joined)
   y = Attention(q, k1, v1)
}
"""
    arrays = {"joined": np.array([3, 4, 5, 8])}
    feeds = {"q": floats(3, 4, 2, 8), "k": floats(3, 1, 5, 8), "v": floats(3, 1, 5, 8)}
    count, model, before, after = rewritten(share_heads, text, arrays, feeds)
    assert count == 1
    assert listing(model) == ["Attention(q, k, v)"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    unchanged(share_heads, text.replace("float[3, 1, 5, 8] v", "float[1, 1, 5, 8] v"), **arrays)


@pytest.mark.parametrize(
    ("old", "new", "axis"),
    [
        ("Attention(q, k3, v3)", "Attention(q, k3, k3)", 1),  # repeats whole groups, not each head
        ("v3)", "v)", 2),
        ("v1 = Unsqueeze(v, axis)", "w = Neg(v)\n   v1 = Unsqueeze(w, one)", 2),
    ],
)
def test_other_repetitions_are_left(old: str, new: str, axis: int) -> None:
    arrays = {**heads_arrays(axis), "one": np.array([1])}
    if axis == 1:
        arrays["spread"] = np.array([3, 2, 2, 5, 8])
    unchanged(share_heads, SHARED.replace(old, new), **arrays)


ROTARY = """
turn (float[3, 2, 5, 8] x, float[3, 5, 4] a) => (float[3, 2, 5, 8] y)
{
   twice = Concat<axis: int = -1>(a, a)
   cos = Cos(twice)
   sin = Sin(twice)
   c = Unsqueeze(cos, one)
   s = Unsqueeze(sin, one)
   straight = Mul(x, c)
   low = Slice(x, zero, half, last, one)
   high = Slice(x, half, end, last, one)
   negated = Neg(high)
   turned = Concat<axis: int = -1>(negated, low)
   across = Mul(turned, s)
   y = Add(straight, across)
}
"""


def rotary_arrays() -> dict[str, np.ndarray]:
    return {
        "zero": np.array([0]), "one": np.array([1]), "last": np.array([3]), "half": np.array([4]),
        "end": np.array([2**63 - 1]),
    }  # fmt: skip


def test_written_out_rotation_takes_the_operator() -> None:
    feeds = {"x": floats(3, 2, 5, 8), "a": floats(3, 5, 4)}
    count, model, before, after = rewritten(use_rotary, ROTARY, rotary_arrays(), feeds)
    assert count == 1
    assert sorted(listing(model)) == ["Cos(a)", "RotaryEmbedding(x, a_cos, a_sin)", "Sin(a)"]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(a, a)", "(a, b)"),  # different angles for the second half
        ("Concat<axis: int = -1>(negated, low)", "Concat<axis: int = -1>(low, negated)"),
        ("Slice(x, zero, half, last, one)", "Slice(x, one, five, last, one)"),
        ("negated = Neg(high)", "negated = Abs(high)"),
        ("float[3, 5, 4] a)", "float[1, 5, 4] a)"),  # one row of angles for the whole batch
        ("straight = Mul(x, c)", "w = Abs(x)\n   straight = Mul(w, c)"),
        ("across = Mul(turned, s)", "across = Mul(turned, c)"),
    ],
)
def test_other_sums_are_left(old: str, new: str) -> None:
    text = ROTARY.replace(old, new)
    assert text != ROTARY
    b = np.ones((3, 5, 4), np.float32)
    unchanged(use_rotary, text, **rotary_arrays(), five=np.array([5]), b=b)
