"""A device that every machine has: it computes on the CPU, and refuses, as a GPU does, calls that mix its tensors with the host's.

`on_pretended` runs a function in a process of its own, since torch keeps a device that was added to it: within it tensors can be made on the
device PRETEND and moved to it. Operators of bmgraph run as what they are made of, so that a tensor that one makes on the wrong device is seen.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from bmgraph.utils.torch_internals import python_body
from tests.helpers.processes import fresh_processes

NAME = "pretend"
PRETEND = f"{NAME}:0"

aten = torch.ops.aten
TAKE_HOST = (
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default,
)  # fmt: skip
"""Calls that take tensors of the host beside those of a device."""


class Placed(torch.Tensor):
    """A tensor that is on PRETEND; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Placed:
        made: Placed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=torch.device(PRETEND), requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    def __init__(self, held: torch.Tensor) -> None:
        pass

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.held})"

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index: Any, value: Any) -> None:
        inside, given = pytree.tree_map_only(Placed, lambda item: item.held, (index, value))
        self.held[inside] = given

    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __index__(self) -> int:
        return self.held.__index__()

    def __bool__(self) -> bool:
        return bool(self.held)

    def numpy(self, **options: Any) -> Any:
        raise TypeError(f"can't convert {PRETEND} device type tensor to numpy. Use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _called(func, args, kwargs or {})


class _Made(TorchFunctionMode):
    """Makes tensors of Python's numbers on the host, and moves them: torch does so itself, past all modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = dict(kwargs or {})
        if func is torch.Tensor.new_tensor and isinstance(args[0], Placed):
            named.setdefault("device", torch.device(PRETEND))
            named.setdefault("dtype", args[0].dtype)
            func, args = torch.tensor, args[1:]
        if func in (torch.tensor, torch.as_tensor) and named.get("device") is not None:
            device = named.pop("device")
            return func(*args, **named).to(device)
        return func(*args, **named)


def on_pretended(function: Callable[..., Any], *given: Any) -> Any:
    """What a function of a module gives in a process that has the device; what it raises is raised here, as text."""
    context = fresh_processes()
    told = context.SimpleQueue()
    process = context.Process(target=_run, args=(function, given, torch.get_num_threads(), told))
    process.start()
    while told.empty() and process.is_alive():
        process.join(0.05)
    error, found = ("it ended without a word", None) if told.empty() else told.get()
    process.join()
    assert not error, error
    return found


def _run(function: Callable[..., Any], given: tuple[Any, ...], threads: int, told: Any) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        _setup_privateuseone_for_python_backend(NAME)
        with _Mode(), _Made():
            told.put(("", function(*given)))
    except BaseException:
        told.put((traceback.format_exc()[-4000:], None))


def _called(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
    if any(isinstance(item, FakeTensor) for item in leaves) or active_fake_mode() is not None:
        return func(*args, **kwargs)  # shapes alone, on any device
    placed = any(isinstance(item, Placed) for item in leaves)
    device = kwargs.get("device")
    there = placed if device is None else torch.device(device).type == NAME
    if not placed and not there:
        return func(*args, **kwargs)
    if func is aten.is_set_to.default:
        return all(isinstance(item, Placed) for item in leaves) and func(*(item.held for item in leaves))
    moves = device is not None and (leaves or func is aten._to_copy.default)
    host = [
        item for item in leaves if not isinstance(item, Placed) and item.dim() and item.device.type == "cpu"
    ]
    if placed and host and func not in TAKE_HOST and not moves:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two devices, {PRETEND} and cpu"
        )
    if placed and func.namespace == "bmgraph":
        body = python_body(f"bmgraph::{func.overloadpacket.__name__}")
        if body is not None:
            with _Mode():
                return body(*args, **kwargs)
    given, named = pytree.tree_map_only(Placed, lambda item: item.held, (args, kwargs))
    if device is not None:
        named["device"] = torch.device("cpu")
    if func is aten.copy_.default and not isinstance(args[0], Placed):
        func(*given, **named)
        return args[0]
    found = func(*given, **named)
    if not there:
        return found
    wrapped = pytree.tree_map_only(
        torch.Tensor, lambda item: item if isinstance(item, Placed) else Placed(item), found
    )
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if placed else wrapped
