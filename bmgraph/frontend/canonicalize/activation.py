"""Replace elementwise expressions that equal GELU or SiLU by that operator; they are recognised by evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bmgraph.ir.editor import Editor
from bmgraph.ir.evaluation import run_call

aten = torch.ops.aten

ACTIVATIONS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (aten.gelu.default, {"approximate": "tanh"}),
    (aten.gelu.default, {}),
    (aten.silu.default, {}),
)
"""(operator, options) that an expression is compared with, in this order."""

REQUIRED = frozenset({aten.tanh.default, aten.sigmoid.default, aten.erf.default})
"""An expression without any of these is not evaluated: every activation above needs one."""

TOLERANCE = 1e-6
"""Largest difference at any sample point, in float64, absolute up to 1 and relative above: models round the constants."""


def _sample_points() -> torch.Tensor:
    """Densely where the activations bend; then up to 1e30, where clamps and branches for large values act; and NaN."""
    large = torch.logspace(1, 30, 117, dtype=torch.float64)
    middle = torch.linspace(-9, 9, 181, dtype=torch.float64)
    return torch.cat([-large, middle, large, torch.tensor([torch.nan], dtype=torch.float64)])


def fold_activations(editor: Editor) -> None:
    """Fold every elementwise expression of one tensor that computes one of `ACTIVATIONS`."""
    roots: dict[fx.Node, fx.Node] = {}
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node in editor.graph.nodes:
        root = _root(node, roots)
        if root is not None:
            roots[node] = root
            regions.setdefault(root, []).append(node)
    for root, region in regions.items():
        if not any(node.target in REQUIRED for node in region):
            continue
        for end in region:
            if any(roots.get(user) is not root for user in end.users):
                _fold(editor, root, region, end)


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The only tensor that an elementwise call depends on, through other such calls; None if there is no such tensor."""
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
    if any(end.target is target for target, _ in ACTIVATIONS):
        return
    # the expression is evaluated, not matched: there are too many ways to write one
    points = _sample_points()
    values = {root: points}
    for node in region:
        values[node] = run_call(node, values.__getitem__)
        if node is end:
            break
    for target, options in ACTIVATIONS:
        expected = target(points, **options)
        if torch.allclose(values[end], expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True):
            editor.replace(end, editor.call(target, root, like=end, **options))
            return
