"""What a backend can run and what it runs fast: model passes read it as `context.target`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a backend takes. `activation_modes`: the ways of scaling activations ("static", "dynamic", "none" for weights
    alone), best first."""

    name: str
    activation_modes: tuple[str, ...] = ("static", "dynamic", "none")


TORCH = Target("torch")
"""Where nothing is lowered: the program runs on torch."""
