"""Find random numbers that no program draws as its model does: Python's and numpy's, and any in eval form."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from bmgraph.ir.eval_form import eval_form, random_calls
from bmgraph.ir.program import Program, copy_graph

UNUSUAL_DRAWS = ((116_882, 90_330), (119_191, 27_421))
"""Seeds for (Python's random, numpy's): their first draws are all below 0.03, or all above 0.97, so that what a rare
draw decides, such as dropping a layer, is decided otherwise."""


def random_eval_calls(program: Program) -> str:
    """The random operators that are left in the eval form, with their modules; empty if there are none."""
    graph = copy_graph(program.graph)
    eval_form(graph, len(program.outputs))
    found = [
        f"{node.target} in {node.meta.get('scope') or 'the root module'}" for node in random_calls(graph)
    ]
    return ", ".join(dict.fromkeys(found))


class HostGenerators:
    """Watches the generators of Python and numpy: what they decide is frozen into a trace."""

    def __init__(self) -> None:
        self._before = _states()

    def moved(self) -> str:
        """The generators that were drawn from since the start; empty if none was."""
        return " and ".join(name for name, state in _states().items() if state != self._before[name])


def seed_host(python: int, numpy: int) -> None:
    """Seed the generators of Python and numpy."""
    random.seed(python)
    np.random.seed(numpy)


def seed_torch_anew() -> None:
    """Give torch's generator another state than it has."""
    torch.random.manual_seed(torch.random.initial_seed() ^ 0x5EED)


def _states() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=True)
    name, keys, position, *rest = state
    return {"Python's random": random.getstate(), "numpy.random": (name, keys.tobytes(), position, *rest)}
