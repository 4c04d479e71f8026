"""What a backend can run and what it runs fast: model passes read it as `context.target`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """The legal and fast forms of a backend.

    `weight_symmetric`: a weight's codes have zero point 0; `activation_symmetric`: an activation's too;
    `weight_granularity`: "channel" or "tensor"; `activation_modes`: the ways of scaling activations that run
    fast, best first ("static", "dynamic", "none" for weights alone).
    """

    name: str
    weight_symmetric: bool = True
    activation_symmetric: bool = False
    weight_granularity: str = "channel"
    activation_modes: tuple[str, ...] = ("static", "dynamic", "none")


TORCH = Target("torch")
"""Where nothing is lowered: the program runs on torch."""
