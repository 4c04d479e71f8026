"""From a PyTorch model to a Program: export, normal form, proof against eager."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from bmgraph.compare import relative_error
from bmgraph.editor import remove_dead
from bmgraph.errors import CaptureError
from bmgraph.free_sizes import bound_axes
from bmgraph.metadata import dims
from bmgraph.normal.form import normalize
from bmgraph.normal.inline import inline_regions
from bmgraph.normal.mutation import functionalise
from bmgraph.program import FORWARD, Program, output_node, placeholders
from bmgraph.signature import Range, TensorSpec
from bmgraph.torch_internals import output_names

PROOF_TOLERANCE = 1e-4
"""Largest relative L2 distance between a captured program and its eager model, at float32."""

Example = Mapping[str, Any] | Sequence[Any]


def capture(model: nn.Module, example: Example, *, dynamic: bool = True, prove: bool = True) -> Program:
    """Capture a model as a Program.

    `example` is a dict of the inputs of `forward` by name, or a tuple in its order; values that are no tensors
    (flags) are baked in. Sizes are dynamic where the model allows it (with `dynamic`); what stayed fixed is
    listed in `program.fixed`. A batch of 1 is repeated to 2, since export would fix it. The result is compared
    with the eager model on the example, in eval and in training form (with `prove`; never on `meta`).

    Raises CaptureError where the model cannot be captured, saying where and what to do.

    Example:
        >>> import torch, bmgraph as bg
        >>> program = bg.capture(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
        >>> list(program.parameters)
        ['weight', 'bias']
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module to capture, found a {type(model).__name__}")
    inputs = _named(model, example)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    if not tensors:
        raise CaptureError("the example holds no tensor: give at least one input of the model's forward")
    _check_weights(model)
    tensors = _at_least_two(tensors)
    constants = {**_quiet_flags(model, inputs), **constants}
    was_training = model.training
    try:
        program = _capture_best(model, tensors, constants, dynamic, prove)
    finally:
        model.train(was_training)
    return program


def _named(model: nn.Module, example: Example) -> dict[str, Any]:
    parameters = inspect.signature(model.forward).parameters
    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, Mapping):
        names = [name for name, item in parameters.items() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(example) > len(names):
            raise CaptureError(
                f"the example has {len(example)} inputs, but forward takes {len(names)}: {', '.join(names)}"
            )
        example = dict(zip(names, example))
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    for name, value in example.items():
        if name not in parameters and not open_ended:
            raise CaptureError(f"forward has no input {name!r}; it takes {', '.join(parameters)}")
        if not isinstance(value, (torch.Tensor, bool, int, float, str, type(None))):
            raise CaptureError(
                f"input {name!r} is a {type(value).__name__}: give tensors, or flags that are baked in"
            )
    missing = [
        name
        for name, item in parameters.items()
        if item.default is inspect.Parameter.empty
        and item.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        and name not in example
    ]
    if missing:
        raise CaptureError(f"the example lacks {', '.join(map(repr, missing))}, which forward needs")
    return dict(example)


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" or not parameter.is_floating_point():
            continue
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(
            torch.isfinite(parameter.detach()).all()
        ):
            raise CaptureError(
                f"parameter {name!r} holds NaN or infinity: load sound weights before capturing"
            )


def _at_least_two(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Repeat a batch of 1, which export would fix for good."""
    with_batch = [tensor for tensor in tensors.values() if tensor.dim() > 0]
    if not with_batch or any(tensor.shape[0] != 1 for tensor in with_batch):
        return tensors
    return {
        name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor
        for name, tensor in tensors.items()
    }


def _quiet_flags(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward that can return its key-value cache is asked not to: generation makes its own."""
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in takes and "use_cache" not in inputs else {}


def _capture_best(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool, prove: bool
) -> Program:
    """The training capture if it is proven to give the eval form; else the eval capture, which cannot train."""
    meta = any(parameter.device.type == "meta" for parameter in model.parameters())
    prove = prove and not meta
    expected = _run_eager(model, tensors, constants) if prove else None
    try:
        model.train()
        program = _export(model, tensors, constants, dynamic)
        reason = _disproof(program, expected) or (
            _training_disproof(program, model, constants) if prove else ""
        )
    except CaptureError as error:
        program, reason = None, f"capturing its training form failed: {error}"
    if program is not None and not reason:
        return program
    model.eval()
    program = _export(model, tensors, constants, dynamic)
    program.training = reason
    wrong = _disproof(program, expected)
    if wrong:
        raise CaptureError(
            f"the captured program is not the model: {wrong}; please report this model's forward"
        )
    return program


def _run_eager(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], constants: Mapping[str, Any]
) -> list[torch.Tensor]:
    model.eval()
    with torch.no_grad():
        try:
            result = model(**tensors, **constants)
        except Exception as error:
            raise CaptureError(
                f"the model does not run on the example: {type(error).__name__}: {error}"
            ) from error
    return tensor_leaves(result)


def tensor_leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of a model's output, in order."""
    leaves = torch.utils._pytree.tree_leaves(result)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _disproof(program: Program, expected: list[torch.Tensor] | None) -> str:
    """Where the eval form differs from eager eval; empty where it does not, or on `meta`."""
    if expected is None:
        return ""
    found = program(**program.example)
    if len(found) != len(expected):
        return f"it returns {len(found)} tensors where eager returns {len(expected)}"
    for (name, mine), theirs in zip(found.items(), expected):
        error = relative_error(mine, theirs)
        if not error <= PROOF_TOLERANCE:
            return f"its eval form differs from eager in {name} by {error:.1e} (relative)"
    return ""


def _training_disproof(program: Program, model: nn.Module, constants: Mapping[str, Any]) -> str:
    """Where the training form without dropout differs from the eager model in training mode without dropout."""
    from bmgraph.modes import without_dropout

    state = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    rng = torch.random.get_rng_state()
    try:
        with torch.no_grad(), _NoDropout():
            expected = tensor_leaves(model(**program.example, **constants))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(state[name])
        torch.random.set_rng_state(rng)
    quiet = program.clone()
    without_dropout(quiet.graph)
    quiet.buffers = {name: buffer.clone() for name, buffer in quiet.buffers.items()}
    with torch.no_grad():
        found = quiet.module(training=True)(*quiet.example.values())
    torch.random.set_rng_state(rng)
    for spec, mine, theirs in zip(program.outputs, found, expected):
        error = relative_error(mine, theirs)
        if not error <= PROOF_TOLERANCE:
            return f"its training form differs from eager in {spec.name} by {error:.1e} (relative)"
    return ""


class _NoDropout(TorchFunctionMode):
    """Runs a model in training mode with every dropout probability at 0."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        functional = torch.nn.functional
        if func in (
            functional.dropout,
            functional.dropout1d,
            functional.dropout2d,
            functional.alpha_dropout,
            torch.dropout,
        ):
            return args[0] if args else kwargs["input"]
        if func is functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _export(
    model: nn.Module, tensors: dict[str, torch.Tensor], constants: dict[str, Any], dynamic: bool
) -> Program:
    """Export with as many dynamic sizes as the model takes."""
    everywhere = {name: set(range(tensor.dim())) for name, tensor in tensors.items()}
    batch_only = {name: {0} & axes for name, axes in everywhere.items()}
    nowhere: dict[str, set[int]] = {name: set() for name in tensors}
    failure: Exception | None = None
    attempts = [everywhere, batch_only, nowhere] if dynamic else [nowhere]
    while attempts:
        axes = attempts.pop(0)
        shapes = {name: dict.fromkeys(axes[name], torch.export.Dim.AUTO) or None for name in tensors}
        shapes |= dict.fromkeys(constants)
        try:
            with _quiet():
                exported = torch.export.export(
                    model,
                    (),
                    {**tensors, **constants},
                    dynamic_shapes=_shapes_of(model, shapes),
                    strict=False,
                )
            bound = _bound(exported, tensors)
            if bound:
                attempts.insert(0, {name: free - bound.get(name, set()) for name, free in axes.items()})
                continue
            return _program(model, exported, tensors)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises many kinds; each is told below
            failure = failure or error
    assert failure is not None
    raise CaptureError(_explain(failure)) from failure


def _bound(exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """Axes that the export calls dynamic although the traced graph holds for some of their sizes only."""
    fake = {
        node.name: node.meta["val"]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.name in tensors
    }
    return bound_axes(fake, exported.range_constraints)


def _shapes_of(model: nn.Module, shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes by the names of forward; those that it collects in `**kwargs` go under that name."""
    parameters = inspect.signature(model.forward).parameters
    named = {name: value for name, value in shapes.items() if name in parameters}
    rest = {name: value for name, value in shapes.items() if name not in parameters}
    collector = [name for name, item in parameters.items() if item.kind is inspect.Parameter.VAR_KEYWORD]
    return {**named, collector[0]: rest} if rest else named


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export's warnings from the user: what matters is raised or listed."""
    import logging
    import warnings

    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _explain(error: Exception) -> str:
    """One line: what happened, where in the user's model, what to do."""
    text = str(error)
    kind = type(error).__name__
    where = user_line(text) or user_line(_trace_text(error))
    place = f" at {where}" if where else ""
    if "data-dependent" in text or kind in (
        "GuardOnDataDependentSymNode",
        "UserError",
        "DataDependentOutputException",
    ):
        return (
            f"the model's control flow depends on data{place}: a graph has one path; replace the Python branch by "
            "torch.where or torch.cond, or decide it outside of forward"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), kind)
    return f"torch.export could not trace the model{place}: {kind}: {first[:300]}"


def user_line(text: str) -> str:
    """The last `file.py:line` of a stack trace that is not torch's own; empty where there is none."""
    import re

    frames = re.findall(r'File "([^"]+)", line (\d+)', text)
    outside = [f"{file}:{line}" for file, line in frames if "/torch/" not in file and "/bmgraph/" not in file]
    return outside[-1] if outside else ""


def _trace_text(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _program(
    model: nn.Module, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> Program:
    canonical, ties = _ties(model)
    state: dict[str, torch.Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    names: dict[str, str] = {}
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    kinds = torch.export.graph_signature.InputKind
    for spec in exported.graph_signature.input_specs:
        if spec.kind is kinds.USER_INPUT:
            continue
        target = spec.target
        if target is None:
            raise CaptureError(
                f"the model takes a {spec.kind.name.lower().replace('_', ' ')}, which no graph can hold"
            )
        found = state.get(target)
        if found is None:
            found = exported.constants.get(target)
            target = f"constant.{target}"
        if not isinstance(found, torch.Tensor):
            raise CaptureError(
                f"{target!r} is a {type(found).__name__}, which no graph can hold: keep tensors only"
            )
        target = canonical.get(target, target)
        names[spec.arg.name] = target
        (parameters if isinstance(found, nn.Parameter) else buffers)[target] = found.detach()
    readers: dict[str, fx.Node] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            target = names[node.name]
            if target not in readers:
                readers[target] = graph.get_attr(target)
                readers[target].meta["val"] = node.meta["val"]
            values[node] = readers[target]
        elif node.op == "placeholder":
            if node.name not in tensors:
                values[node] = node.meta.get("val")
                continue
            values[node] = graph.placeholder(node.name)
            values[node].meta["val"] = node.meta["val"]
        elif node.op == "output":
            _finish(graph, node, values)
        elif node.op == "get_attr":
            values[node] = None
        else:
            region = inline_regions(exported.graph_module, node, graph, values)
            if region is not None:
                values[node] = region
            elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
                values[node] = values[node.args[0]][node.args[1]]
            else:
                values[node] = graph.node_copy(node, lambda old: values[old])
    parameters = {name: parameters[name] for name in dict(model.named_parameters()) if name in parameters}
    trained = dict(model.named_parameters(remove_duplicate=False))
    program = Program(
        graphs={FORWARD: graph},
        parameters=parameters,
        buffers=buffers,
        inputs=(),
        outputs=(),
        ties={alias: name for alias, name in ties.items() if name in parameters},
        example={name: tensor.detach().clone() for name, tensor in tensors.items()},
        frozen=frozenset(name for name in parameters if not trained[name].requires_grad),
    )
    _normal_form(program, exported, tensors)
    return program


def _finish(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> None:
    results: Any = node.args[0]
    returned = [values[item] if isinstance(item, fx.Node) else item for item in results]
    output = graph.output(tuple(returned))
    output.meta = {}


def _normal_form(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    graph = program.graph
    output = output_node(graph)
    names = output_names(exported.call_spec.out_spec)
    leaves: Any = output.args[0]
    kept = [(name, leaf) for name, leaf in zip(names, leaves) if isinstance(leaf, fx.Node)]
    output.args = (tuple(leaf for _, leaf in kept),)
    _scopes(graph)
    for name in placeholders(graph):
        if name not in tensors:
            raise CaptureError(f"export made an input {name!r} of its own, which is not supported")
    _order_inputs(program, exported, tensors)
    writes = functionalise(graph, set(program.buffers))
    program.writes = tuple(writes)
    returned: Any = output.args[0]
    output.args = (tuple(returned) + tuple(writes.values()),)
    normalize(program)
    remove_dead(program)
    graph.lint()
    returned = output.args[0]
    specs = []
    for (name, _), node in zip(kept, returned):
        found = node.meta["val"]
        specs.append(TensorSpec(name, found.dtype, dims(program, found)))
    program.outputs = tuple(specs)
    program.losses = tuple(
        spec.name for spec in specs if spec.name.split(".")[-1] == "loss" and spec.shape == ()
    )


def _order_inputs(
    program: Program, exported: torch.export.ExportedProgram, tensors: dict[str, torch.Tensor]
) -> None:
    """Specs of the inputs, with readable names for the sizes that stayed dynamic."""
    nodes = placeholders(program.graph)
    unused = [name for name in tensors if name not in nodes]
    for name in unused:
        raise CaptureError(f"input {name!r} did not reach the graph")
    ranges = exported.range_constraints
    for name, tensor in tensors.items():
        for axis, size in enumerate(nodes[name].meta["val"].shape):
            if isinstance(size, torch.SymInt):
                _name_symbols(program, size, name, axis, tensor.dim(), ranges)
    program.inputs = tuple(
        TensorSpec(name, tensor.dtype, dims(program, nodes[name].meta["val"]))
        for name, tensor in tensors.items()
    )
    program.example = {name: program.example[name] for name in tensors}
    program.fixed = tuple(
        f"{spec.name}[{axis}] = {dim}"
        for spec in program.inputs
        for axis, dim in enumerate(spec.shape)
        if isinstance(dim, int) and axis < 2 and not (axis == 1 and len(spec.shape) == 4)
    )


def _name_symbols(
    program: Program, size: torch.SymInt, name: str, axis: int, rank: int, ranges: Mapping[Any, Any]
) -> None:
    usual = {
        0: "batch",
        1: "channels" if rank == 4 else "sequence",
        2: "height" if rank == 4 else "features",
        3: "width",
    }
    for symbol in sorted(size.node.expr.free_symbols, key=str):
        if symbol in program.symbols:
            continue
        stem = usual.get(axis, f"size_{axis}")
        if axis == 0 and _is_batch(program, name):
            program.symbols[symbol] = stem
            program.ranges.setdefault(stem, Range())
            continue
        label, count = stem, 1
        while label in program.symbols.values():
            count += 1
            label = f"{stem}_{count}"
        program.symbols[symbol] = label
        bounds = ranges.get(symbol)
        low = int(bounds.lower) if bounds is not None and bounds.lower.is_Integer else 1
        high = (
            int(bounds.upper) if bounds is not None and getattr(bounds.upper, "is_Integer", False) else None
        )
        program.ranges[label] = Range(
            1 if low <= 2 else low, high if high is not None and high < 2**31 else None
        )


def _is_batch(program: Program, name: str) -> bool:
    """Whether an input is as long as the first one: rows of one batch."""
    sizes = [tensor.shape[0] for tensor in program.example.values() if tensor.dim()]
    return program.example[name].shape[0] == sizes[0]


def _scopes(graph: fx.Graph) -> None:
    """Write the module path on every node."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            path = str(list(stack.values())[-1][0])
            node.meta["scope"] = path.replace("L['self'].", "").replace("L['self']", "")


def _ties(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """For every name of a parameter or buffer the one it is kept under, and the aliases alone."""
    first: dict[int, str] = {}
    canonical: dict[str, str] = {}
    ties: dict[str, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        kept = first.setdefault(id(tensor), name)
        canonical[name] = kept
        if kept != name:
            ties[name] = kept
    return canonical, ties
