"""The rows of torch's operators, of all overloads of each; one that is not here is known by its tags alone."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch

from bmgraph.ops.trait_row import Dims, Flops, Kind, Lookup, Traits

aten = torch.ops.aten

FIRST, SECOND, BOTH, ALWAYS = (0,), (1,), (0, 1), ()

RESHAPE = Traits(Kind.RESHAPE, Dims.MOVED, traced=True, keeps_values=True, not_negative=FIRST)
COPY = Traits(Kind.RESHAPE, Dims.ELEMENTWISE, keeps_values=True, linear=True, not_negative=FIRST)
LAYOUT = Traits(Kind.LAYOUT, Dims.MOVED, traced=True, keeps_values=True, not_negative=FIRST)
PERMUTATION = Traits(Kind.LAYOUT, Dims.PERMUTED, traced=True, keeps_values=True, not_negative=FIRST)
TURNED = Traits(Kind.LAYOUT, Dims.MOVED, keeps_values=True, not_negative=FIRST)
VIEW = Traits(dims=Dims.MOVED)
IDENTITY = Traits(dims=Dims.ELEMENTWISE, linear=True, keeps_values=True, not_negative=FIRST)
CAST = Traits(Kind.CAST, Dims.ELEMENTWISE, linear=True, whole=True, not_negative=FIRST)
SPLIT = Traits(Kind.SPLIT, Dims.MOVED, traced=True)
BOX = Traits(Kind.SELECTION, Dims.MOVED, traced=True, not_negative=FIRST)
JOIN = Traits(Kind.JOIN, Dims.MOVED, traced=True)
ELEMENTWISE = Traits(dims=Dims.ELEMENTWISE)

MOVEMENTS: dict[Any, Traits] = {
    **dict.fromkeys((aten.reshape, aten.view), RESHAPE),
    **dict.fromkeys((aten.contiguous, aten.clone), COPY),
    **dict.fromkeys((aten.unsqueeze, aten.squeeze, aten.flatten, aten.unflatten, aten.repeat), LAYOUT),
    aten.repeat_interleave: Traits(Kind.LAYOUT, Dims.MOVED, traced=True),
    **dict.fromkeys((aten.transpose, aten.permute, aten.t), PERMUTATION),
    **dict.fromkeys((aten.roll, aten.flip), TURNED),
    aten.expand: Traits(Kind.LAYOUT, Dims.EXPANDED, traced=True, keeps_values=True, not_negative=FIRST),
    **dict.fromkeys((aten.expand_as, aten.broadcast_tensors), Traits(dims=Dims.EXPANDED)),
    aten.constant_pad_nd: Traits(Kind.LAYOUT, Dims.PADDED, traced=True),
    aten.pad: Traits(Kind.LAYOUT, Dims.PADDED),
    **dict.fromkeys(
        (aten.movedim, aten.unfold, aten._unsafe_view, aten.diagonal, aten.numpy_T, aten.mT, aten.swapaxes, aten.swapdims,
         aten.moveaxis),
        VIEW,
    ),
    **dict.fromkeys((aten.slice_scatter, aten.select_scatter), Traits(dims=Dims.INSERTED)),
    **dict.fromkeys((aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.tensor_split), SPLIT),
    **dict.fromkeys((aten.slice, aten.select, aten.narrow), BOX),
    operator.getitem: Traits(Kind.SELECTION),
    aten.index: Traits(Kind.SELECTION, Dims.INDEX, Lookup.LIST, traced=True),
    aten.gather: Traits(Kind.SELECTION, Dims.GATHER, Lookup.AXIS, traced=True, not_negative=FIRST),
    aten.index_select: Traits(Kind.SELECTION, Dims.INDEX_SELECT, Lookup.AXIS, traced=True, not_negative=FIRST),
    **dict.fromkeys((aten.cat, aten.stack), JOIN),
    **dict.fromkeys((aten.scatter, aten.scatter_add), Traits(dims=Dims.SCATTER, lookup=Lookup.WRITTEN_AXIS)),
    aten.index_add: Traits(lookup=Lookup.WRITTEN_AXIS),
    **dict.fromkeys((aten.tril, aten.triu), Traits(dims=Dims.BANDED)),
}  # fmt: skip

ELEMENTWISE_CALLS: dict[Any, Traits] = {
    **dict.fromkeys((aten.alias, aten.detach), IDENTITY),
    **dict.fromkeys((aten.lift_fresh_copy, torch.ops.prims.view_of), Traits(dims=Dims.ELEMENTWISE, linear=True)),
    **dict.fromkeys((aten.to, aten._to_copy), CAST),
    aten.type_as: Traits(Kind.CAST, Dims.ELEMENTWISE),
    aten.neg: Traits(Kind.LAYOUT, Dims.ELEMENTWISE, linear=True, lowers=True),
    **dict.fromkeys((aten.add, operator.add), Traits(Kind.SUM, Dims.ELEMENTWISE, not_negative=BOTH)),
    **dict.fromkeys((aten.sub, operator.sub), Traits(Kind.SUM, Dims.ELEMENTWISE, lowers=True)),
    aten.rsub: Traits(Kind.DIFFERENCE, Dims.ELEMENTWISE, lowers=True),
    operator.neg: Traits(lowers=True),
    **dict.fromkeys((aten.mul, operator.mul), Traits(Kind.SCALING, Dims.ELEMENTWISE, whole=True, not_negative=BOTH)),
    aten.div: Traits(Kind.QUOTIENT, Dims.ELEMENTWISE),
    aten.masked_fill: Traits(Kind.MASKING, Dims.ELEMENTWISE, not_negative=(0, 2)),
    aten.where: Traits(Kind.MASKING, Dims.ELEMENTWISE, not_negative=(1, 2)),
    **dict.fromkeys((aten.__and__, aten.__or__, aten.__xor__, aten.fill, aten.copy, aten.bernoulli), ELEMENTWISE),
    **dict.fromkeys((aten.gelu, aten.silu), Traits(Kind.ACTIVATION, Dims.ELEMENTWISE, relu_like=True)),
    aten.relu: Traits(Kind.ACTIVATION, Dims.ELEMENTWISE, relu_like=True, homogeneous=True),
    **dict.fromkeys((aten.maximum, aten.minimum), Traits(dims=Dims.ELEMENTWISE, not_negative=BOTH)),
    **dict.fromkeys((aten.clamp, aten.clamp_min), Traits(dims=Dims.ELEMENTWISE, not_negative=SECOND)),
    aten.abs: Traits(dims=Dims.ELEMENTWISE, not_negative=ALWAYS),
    aten.floor_divide: Traits(not_negative=BOTH),
    aten.remainder: Traits(not_negative=SECOND),
    aten.prelu: Traits(dims=Dims.WEIGHTED),
    aten.one_hot: Traits(dims=Dims.ONE_HOT),
}  # fmt: skip

DROPOUT = Traits(Kind.DROPOUT, Dims.ELEMENTWISE, train="train", drop="p")
RECURRENT = Traits(train="train", drop="dropout")
STATISTICS = ("running_mean", "running_var")
BATCH_NORM = Traits(dims=Dims.BATCH, train="training", writes=STATISTICS)

TRAINING: dict[Any, Traits] = {
    **dict.fromkeys((aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout), DROPOUT),
    aten.native_dropout: ELEMENTWISE,
    **dict.fromkeys((aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu), RECURRENT),
    aten.rrelu: Traits(dims=Dims.ELEMENTWISE, train="training"),
    aten.batch_norm: Traits(Kind.NORM, Dims.BATCH, train="training", writes=STATISTICS),
    aten.instance_norm: Traits(Kind.NORM, Dims.PER_ITEM, train="use_input_stats", writes=STATISTICS),
    aten.native_batch_norm: BATCH_NORM,
    **dict.fromkeys((aten.cudnn_batch_norm, aten.miopen_batch_norm), Traits(train="training", writes=STATISTICS)),
    aten._native_batch_norm_legit: Traits(dims=Dims.BATCH, train="training"),
}  # fmt: skip

CREATIONS: dict[Any, Traits] = {
    aten.full_like: Traits(Kind.FILL, Dims.SIZES_ALONE, not_negative=SECOND),
    **dict.fromkeys((aten.zeros_like, aten.ones_like), Traits(dims=Dims.SIZES_ALONE, not_negative=ALWAYS)),
    **dict.fromkeys((aten.empty_like, aten.rand_like, aten.randn_like), Traits(dims=Dims.SIZES_ALONE)),
    **dict.fromkeys((aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty), Traits(dims=Dims.NEW)),
    aten.full: Traits(Kind.FILL, Dims.CREATED, not_negative=SECOND),
    aten.scalar_tensor: Traits(Kind.FILL, Dims.CREATED),
    **dict.fromkeys((aten.zeros, aten.ones), Traits(dims=Dims.CREATED, not_negative=ALWAYS)),
    **dict.fromkeys((aten.empty, aten.rand, aten.randn), Traits(dims=Dims.CREATED)),
    aten.sym_size: Traits(Kind.SIZE, Dims.SIZES_ALONE, not_negative=ALWAYS),
    **dict.fromkeys((aten.sym_numel, aten.sym_stride, aten.sym_storage_offset), Traits(Kind.SIZE, Dims.SIZES_ALONE)),
}  # fmt: skip

REDUCED = Traits(dims=Dims.REDUCED)
COUNTED = Traits(dims=Dims.REDUCED, depends_on_count=True)
SOFTMAX = Traits(Kind.SOFTMAX, Dims.ALONG)
NORM = Traits(Kind.NORM, Dims.NORMED, depends_on_count=True)

REDUCTIONS: dict[Any, Traits] = {
    aten.sum: Traits(
        dims=Dims.REDUCED, linear=True, adds=True, whole=True, not_negative=FIRST, depends_on_count=True
    ),
    aten.mean: Traits(dims=Dims.REDUCED, linear=True, depends_on_count=True),
    aten.count_nonzero: Traits(dims=Dims.REDUCED, adds=True),
    **dict.fromkeys((aten.argmax, aten.argmin), Traits(dims=Dims.REDUCED, not_negative=ALWAYS, ranks=1)),
    **dict.fromkeys((aten.amax, aten.amin, aten.std, aten.var), COUNTED),
    **dict.fromkeys((aten.any, aten.all, aten.logsumexp, aten.prod), REDUCED),
    **dict.fromkeys((aten.max, aten.min), Traits(dims=Dims.REDUCED, ranks=1)),
    aten.linalg_vector_norm: Traits(dims=Dims.VECTOR_NORM, depends_on_count=True),
    aten.softmax: Traits(Kind.SOFTMAX, Dims.ALONG, depends_on_count=True),
    **dict.fromkeys((aten._softmax, aten._safe_softmax), SOFTMAX),
    **dict.fromkeys((aten.log_softmax, aten._log_softmax), Traits(dims=Dims.ALONG)),
    aten.cumsum: Traits(dims=Dims.ALONG, not_negative=FIRST),
    aten.sort: Traits(dims=Dims.ALONG_PARTS, ranks=-1),
    aten.glu: Traits(dims=Dims.ALONG_PARTS),
    **dict.fromkeys((aten.topk, aten.kthvalue), Traits(dims=Dims.SELECTED, ranks=1)),
    aten.diff: Traits(dims=Dims.SELECTED),
    aten.argsort: Traits(not_negative=ALWAYS, ranks=-1),
    **dict.fromkeys((aten.nonzero, aten.bucketize), Traits(not_negative=ALWAYS)),
    **dict.fromkeys((aten.layer_norm, aten.rms_norm), NORM),
    aten.native_layer_norm: Traits(dims=Dims.NORMED),
    aten.group_norm: Traits(Kind.NORM, Dims.PER_ITEM, depends_on_count=True),
}

CONVOLUTION = Traits(Kind.CONVOLUTION, Dims.PER_ITEM, flops=Flops.CONVOLUTION)

PRODUCTS: dict[Any, Traits] = {
    aten.linear: Traits(Kind.LINEAR, Dims.LINEAR, flops=Flops.PRODUCT),
    **dict.fromkeys((aten.matmul, aten.bmm), Traits(Kind.BATCHED_PRODUCT, Dims.MATMUL, flops=Flops.PRODUCT)),
    aten.baddbmm: Traits(Kind.BATCHED_PRODUCT, Dims.ADDED_MATMUL, flops=Flops.PRODUCT, factors=(1, 2)),
    aten.mm: Traits(Kind.PRODUCT, Dims.MATMUL, flops=Flops.PRODUCT),
    aten.addmm: Traits(Kind.PRODUCT, Dims.ADDED_MATMUL, flops=Flops.PRODUCT, factors=(1, 2)),
    **dict.fromkeys((aten.mv, aten.dot), Traits(Kind.PRODUCT, Dims.MATMUL)),
    aten.einsum: Traits(Kind.PRODUCT),
    aten.scaled_dot_product_attention: Traits(
        Kind.ATTENTION, Dims.ATTENTION, flops=Flops.ATTENTION, drop="dropout_p"
    ),
    aten.embedding: Traits(Kind.EMBEDDING, Dims.EMBEDDING, Lookup.ROWS),
    aten.embedding_bag: Traits(lookup=Lookup.ROWS),
    aten.conv1d: replace(CONVOLUTION, spatial=1),
    aten.conv2d: replace(CONVOLUTION, spatial=2),
    aten.conv3d: replace(CONVOLUTION, spatial=3),
    aten.convolution: CONVOLUTION,
}

IMAGES: dict[Any, Traits] = {
    **dict.fromkeys(
        (aten.conv_transpose1d, aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d),
        Traits(dims=Dims.PER_ITEM, spatial=1),
    ),
    **dict.fromkeys(
        (
            aten.conv_transpose2d, aten.im2col, aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d,
            aten._adaptive_avg_pool2d, aten.max_pool2d_with_indices, aten.upsample_nearest2d, aten.upsample_bilinear2d,
            aten.upsample_bicubic2d,
        ),
        Traits(dims=Dims.PER_ITEM, spatial=2),
    ),
    **dict.fromkeys((aten.pixel_shuffle, aten.native_group_norm), Traits(dims=Dims.PER_ITEM)),
}  # fmt: skip

CLASS_LOSS = Traits(Kind.LOSS, Dims.CLASS_LOSS)

LOSSES: dict[Any, Traits] = {
    **dict.fromkeys((aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd), CLASS_LOSS),
    **dict.fromkeys((aten.nll_loss_forward, aten.nll_loss2d_forward), Traits(dims=Dims.CLASS_LOSS)),
    **dict.fromkeys(
        (aten.mse_loss, aten.l1_loss, aten.huber_loss, aten.smooth_l1_loss, aten.binary_cross_entropy_with_logits,
         aten.binary_cross_entropy, aten.kl_div, aten.soft_margin_loss),
        Traits(Kind.LOSS, Dims.ELEMENTWISE_LOSS),
    ),
}  # fmt: skip

OTHERS: dict[Any, Traits] = {
    **MOVEMENTS, **ELEMENTWISE_CALLS, **TRAINING, **CREATIONS, **REDUCTIONS, **PRODUCTS, **IMAGES, **LOSSES,
}  # fmt: skip

PRECISE: tuple[Any, ...] = (
    *LOSSES,
    aten.layer_norm, aten.rms_norm, aten.group_norm, aten.batch_norm, aten.instance_norm,
    aten.softmax, aten._softmax, aten._safe_softmax, aten.log_softmax, aten._log_softmax, aten.logsumexp,
    aten.sum, aten.mean, aten.prod, aten.std, aten.var, aten.cumsum, aten.linalg_vector_norm,
    aten.exp, aten.expm1, aten.log, aten.log1p, aten.log2, aten.log10, aten.pow, aten.rsqrt, aten.reciprocal,
    aten.log_sigmoid, aten.softplus, aten.tan, aten.sinh, aten.cosh, aten.asin, aten.acos, aten.erfinv,
)  # fmt: skip
"""What autocast of torch keeps in float32 as well; those without a row are elementwise."""

ROWS: dict[Any, Traits] = {
    **OTHERS,
    **{item: replace(OTHERS.get(item, ELEMENTWISE), precise=True) for item in PRECISE},
}
"""Operator (all its overloads), or Python function on sizes -> its row."""
