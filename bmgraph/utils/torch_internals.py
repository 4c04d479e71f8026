"""The only module that imports private parts of torch, so that a new torch release needs changes in one file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._dispatch.python import enable_python_dispatcher as python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.fx import Graph, GraphModule, Proxy, map_arg
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.node import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch.utils._sympy.value_ranges import ValueRanges

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "OpOverload",
    "TorchDispatchMode",
    "decomposed",
    "distinct",
    "fake_group",
    "fake_inputs",
    "fake_mode_of",
    "forgetting_new_sizes",
    "is_composite_view",
    "keeping_sizes_free",
    "module_call_graph",
    "new_fake_mode",
    "number_nodes",
    "output_names",
    "packing_weights",
    "planning_mode",
    "process_group_of",
    "python_body",
    "python_dispatcher",
    "readers_of_storage",
    "traced_so_far",
    "unowned",
    "value_ranges",
]  # fmt: skip


def new_fake_mode() -> FakeTensorMode:
    """A fake tensor mode: tensors have shapes, possibly symbolic, and no data."""
    from torch.fx.experimental.symbolic_shapes import (
        ShapeEnv,
    )  # imports sympy: what runs an engine does without

    return FakeTensorMode(shape_env=ShapeEnv(duck_shape=True, assume_static_by_default=False))


def planning_mode() -> FakeTensorMode:
    """A fake tensor mode with fixed sizes, in which calls on ordinary tensors are allowed."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def packing_weights() -> AbstractContextManager[None]:
    """Within it, what torch.compile makes without gradients has a module's parameters as constants, packed as products read them."""
    import torch._inductor.config as inductor

    return inductor.patch(freezing=True)  # type: ignore[no-any-return]


@contextmanager
def fake_group(size: int) -> Iterator[None]:
    """Within it, torch.distributed's default group is one of `size` ranks of which only the first exists; it sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fake_mode_of(nodes: Sequence[Node]) -> FakeTensorMode | None:
    """The mode that created the fake values of these nodes, or None if no node has one."""
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def decomposed(node: Node, table: Mapping[Any, Callable[..., Any]] | None = None) -> GraphModule | None:
    """The graph of a call, with the node's inputs as placeholders; None for an operator that cannot be decomposed.

    With a `table` (operator -> what it is made of) operators are decomposed as it says; without one, composite ones are.
    """
    target: Any = node.target
    mode = fake_mode_of([*node.all_input_nodes, node])
    if mode is None or not isinstance(target, OpOverload):
        return None
    if table is None and not target._can_decompose():
        return None
    nodes = node.all_input_nodes

    def call(*values: Any) -> Any:
        held = dict(zip(nodes, values))
        args, kwargs = map_arg(node.args, held.__getitem__), map_arg(dict(node.kwargs), held.__getitem__)
        return target.decompose(*args, **kwargs) if table is None else target(*args, **kwargs)

    with mode, keeping_sizes_free(mode), python_dispatcher():
        made: GraphModule = make_fx(call, decomposition_table=table)(
            *distinct(item.meta["val"] for item in nodes)
        )
    return made


def distinct(values: Iterable[Any]) -> list[Any]:
    """Fake values, each an object of its own: a trace takes two inputs that are one object for one input."""
    return [
        value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for value in values
    ]


def is_composite_view(target: object) -> bool:
    """Whether an operator is made of others and may return a view of its input, such as `to` and `reshape`: torch's
    decomposition never keeps those."""
    if not isinstance(target, OpOverload) or not target._can_decompose():
        return False
    return any(item.alias_info is not None for item in target._schema.returns)


def keeping_sizes_free(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Within it, what is computed with fake tensors cannot fix or tie dynamic sizes."""
    return nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


def forgetting_new_sizes(mode: FakeTensorMode) -> AbstractContextManager[object]:
    """Within it, sizes that depend on data, such as the number of items that a mask selects, need not be returned: a later
    trace does not wait for them."""
    return nullcontext() if mode.shape_env is None else mode.shape_env.ignore_fresh_unbacked_symbols()


def fake_inputs(
    mode: FakeTensorMode, shapes: Mapping[str, tuple[Sequence[tuple[int, bool]], torch.dtype]]
) -> dict[str, torch.Tensor]:
    """Fake tensors of the given shapes and dtypes.

    A size is (hint, dynamic); equal dynamic hints share a symbol.
    """
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    result: dict[str, torch.Tensor] = {}
    for name, (sizes, dtype) in shapes.items():
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK if dynamic else DimDynamic.STATIC for _, dynamic in sizes]
        )
        example = torch.empty([hint for hint, _ in sizes], dtype=dtype)
        result[name] = mode.from_tensor(example, symbolic_context=context)
    return result


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A dotted name for each leaf of a model's output: mapping keys, attribute names or positions."""
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = []
    for path, _ in paths:
        keys = [_key_text(key) for key in path]
        names.append(".".join(keys) or "output")
    named = [f"output.{name}" if name.split(".")[0].isdigit() else name for name in names]
    return [_numbered(name, named[:index]) for index, name in enumerate(named)]


def _numbered(name: str, before: Sequence[str]) -> str:
    """`name`, with a number if a name before it is the same: keys may hold dots."""
    count = before.count(name)
    return f"{name}_{count + 1}" if count else name


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def value_ranges(bounds: Mapping[Any, tuple[int, int | None]]) -> dict[Any, ValueRanges[Any]]:
    """Ranges of symbols in the form of torch.export; `None` means no upper bound."""
    import sympy
    from torch.utils._sympy.value_ranges import ValueRanges

    return {
        symbol: ValueRanges(sympy.Integer(low), sympy.oo if high is None else sympy.Integer(high))
        for symbol, (low, high) in bounds.items()
    }


def module_call_graph(inputs: int, outputs: int) -> list[ModuleCallEntry]:
    """The calling convention of a flat program: tensors by position, a tuple as the result."""
    arguments = pytree.tree_structure((tuple(range(inputs)), {}))
    results = pytree.tree_structure(tuple(range(outputs)))
    return [ModuleCallEntry("", ModuleCallSignature([], [], arguments, results))]


def traced_so_far() -> list[str]:
    """The names of the nodes that `make_fx` has made, inside of the function that it traces."""
    mode: Any = get_proxy_mode()
    return [node.name for node in mode.tracer.graph.nodes]


def number_nodes(graph: Graph, expression: Any, symbols: Mapping[Any, Node]) -> Node:
    """Append calls that compute a symbolic expression from the nodes of its symbols."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    last = next(iter(reversed(graph.nodes)))
    found = sympy_interp(
        PythonReferenceAnalysis, {symbol: Proxy(node) for symbol, node in symbols.items()}, expression
    )
    new: Node = last.next
    while new.op == "call_function":
        values: Any = map_arg((new.args, new.kwargs), lambda item: item.meta["val"])
        new.meta["val"] = new.target(*values[0], **values[1])  # type: ignore[operator]
        new = new.next
    result: Node = found.node
    return result


def readers_of_storage(tensor: torch.Tensor) -> int:
    """How many tensors and pending operations hold the memory of a tensor, besides itself."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 2  # the tensor, and `storage`


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the same memory that is no reader of it: the memory must outlive all use of the result."""
    storage = tensor.untyped_storage()
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), tensor.device, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(same, tensor.storage_offset(), tensor.shape, tensor.stride())


def process_group_of(name: str) -> Any:
    """The process group of functional collectives that has a name."""
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


def python_body(name: str) -> Callable[..., Any] | None:
    """The function that a custom operator such as `bmgraph::dequantize` was defined by; None for another operator."""
    from torch._library.custom_ops import OPDEFS

    found = OPDEFS.get(name)
    return None if found is None else found._init_fn
