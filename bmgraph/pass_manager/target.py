"""What a backend can run and what it runs fast: model passes read it as `context.target`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a backend takes.

    activation_modes: the ways of scaling activations ("static", "dynamic", "none" for weights alone), best first.
    symmetric: a rounded activation has s8 codes around 0, where it otherwise has u8 codes and a zero point.
    weight_scales: what a weight's scales may stand for ("channel": one for each output).
    expert_blocks: by how many values of a row a kernel for experts scales what enters them, largest first; none where
    they are rounded as everything else is.
    """

    name: str
    activation_modes: tuple[str, ...] = ("static", "dynamic", "none")
    symmetric: bool = False
    weight_scales: tuple[str, ...] = ("channel",)
    expert_blocks: tuple[int, ...] = (256, 128, 64, 32, 16)


TORCH = Target("torch")
"""Where nothing is lowered: the program runs on torch."""
