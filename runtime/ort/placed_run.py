"""Runs a session on tensors where they lie: nothing goes through the host's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

Shape = tuple[int, ...]


def run_placed(
    session: Any,
    feeds: Mapping[str, torch.Tensor],
    outputs: Mapping[str, tuple[torch.dtype, Shape]],
    device: torch.device,
) -> list[torch.Tensor]:
    """The outputs of a session on `device`, where its providers compute; inputs that lie elsewhere are copied there first.

    `outputs` are their dtypes and shapes, by name.
    """
    binding = session.io_binding()
    kept: list[torch.Tensor] = []
    for name, value in feeds.items():
        placed = value.detach().to(device).contiguous()
        kept.append(placed)
        binding.bind_input(name, *_place(placed))
    found = []
    for name, (dtype, shape) in outputs.items():
        made = torch.empty(shape, dtype=dtype, device=device)
        binding.bind_output(name, *_place(made))
        found.append(made)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # ONNX Runtime has a stream of its own
    session.run_with_iobinding(binding)
    binding.synchronize_outputs()
    return found


def _place(tensor: torch.Tensor) -> Sequence[Any]:
    """What a binding is told of a tensor: device, its number, element type, shape, address; any address that is none for one without
    elements."""
    kind = torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
    address = tensor.data_ptr() or torch.empty(1, device=tensor.device).data_ptr()
    return tensor.device.type, tensor.device.index or 0, kind, tuple(tensor.shape), address
