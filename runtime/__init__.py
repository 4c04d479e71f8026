"""What a user holds after compiling: engines, and later trainers; loads neither passes nor torch's compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmgraph.runtime.engine import Engine as Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from bmgraph.runtime.engine import Engine

        return Engine
    raise AttributeError(f"module 'bmgraph.runtime' has no attribute {name!r}")
