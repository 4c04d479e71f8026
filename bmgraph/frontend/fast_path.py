"""Turn off torch's fast path of transformer layers, which computes other values at padding than the layers say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Run `nn.TransformerEncoder` as its layers are written, and restore the setting on exit.

    In eval mode torch may run such layers as one kernel on tensors without padding, with zeros at padding afterwards.
    A captured graph holds the layers, so that is what it is compared with.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
