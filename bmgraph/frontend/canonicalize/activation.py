"""Activations that are written out become the operator that computes the same; what they compute is found by trying."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor

aten = torch.ops.aten

KNOWN: tuple[tuple[Any, dict[str, Any]], ...] = (
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.gelu.default, {}),
    (aten.silu.default, {}),
)
"""What a written-out activation may turn out to be."""

CURVES = frozenset({aten.tanh.default, aten.sigmoid.default, aten.erf.default})
"""Every activation of the table is written with one of these."""

CLOSE = 1e-6
"""Largest difference at any tried point, in float64: authors round their constants."""


def fold_activations(editor: Editor) -> None:
    """Fold every expression of one tensor, element by element, that computes a known activation of it."""
    roots: dict[fx.Node, fx.Node] = {}
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node in editor.graph.nodes:
        root = _root(node, roots)
        if root is not None:
            roots[node] = root
            regions.setdefault(root, []).append(node)
    for root, region in regions.items():
        if not any(node.target in CURVES for node in region):
            continue
        for end in region:
            if any(roots.get(user) is not root for user in end.users):
                _fold(editor, root, region, end)


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The one tensor that a call is an expression of, element by element; None where it is none."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.pointwise not in node.target.tags or torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    found = {roots.get(item, item) for item in node.all_input_nodes}
    if len(found) != 1:
        return None
    (root,) = found
    before, after = root.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    return root if before.is_floating_point() and before.dtype == after.dtype else None


def _fold(editor: Editor, root: fx.Node, region: list[fx.Node], end: fx.Node) -> None:
    if any(end.target is target for target, _ in KNOWN):
        return
    points = torch.linspace(-9, 9, 181, dtype=torch.float64)
    values = {root: points}
    for node in region:
        assert callable(node.target)
        values[node] = node.target(*fx.map_arg(node.args, values.__getitem__), **dict(node.kwargs))
        if node is end:
            break
    for target, options in KNOWN:
        if float((values[end] - target(points, **options)).abs().max()) < CLOSE:
            editor.replace(end, editor.call(target, root, like=end, **options))
            return
