"""A package with two families of deltas and a pass that attaches one: that of docs/extending.md, with one more family."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.outside import installed
from tests.helpers.pages import code_of, entry_points_of

PAGE, HEADING = "extending.md", "A delta family"

SHIFT = '''

from bmgraph.api import Delta, delta_base, of_no_family


class Shift(LinearFamily):
    """add(linear, shift) with shift [out]: a bias where there may be none. It reads its deltas itself."""

    name = "shift"
    roles = (delta_role("shift"),)
    peft_type = "SHIFT"
    adds = True
    keys = ("shift",)

    def build(self, call, tensors, change, options):
        return call.end(aten.add.Tensor, call.linear, tensors["shift"])

    def read(self, total):
        if total.args[1].op != "get_attr":
            raise of_no_family(total, "add(linear, shift)")
        tensors = {"shift": total.args[1]}
        return Delta(self, str(total.meta["site"]), delta_base(total), total, tensors=tensors)

    def sizes(self, change):
        return change.tensors["shift"].shape[0], None

    def describe(self, change):
        return "a shift"

    def folded(self, change, weight, bias):
        return weight, change.tensors["shift"] if bias is None else bias + change.tensors["shift"]

    def stacked(self, changes, count):
        stack = torch.zeros(count + 1, len(next(iter(changes.values())).tensors["shift"]))
        for number, change in changes.items():
            stack[number] = change.tensors["shift"]
        return Change({"shift": stack})

    def build_rows(self, call, x, chosen):
        shift = chosen["shift"]
        for _ in range(x.meta["val"].dim() - 2):
            shift = call(aten.unsqueeze.default, shift, 1)
        return call.end(aten.add.Tensor, call.linear, shift)

    def saved(self, program):
        return plain_saved(self, program)

    def loaded(self, path, config, tensors):
        return plain_loaded(self, path, config, tensors)
'''


def install_families(folder: Path) -> None:
    """Leave the package in a folder as `pip install` does."""
    points = entry_points_of(PAGE, HEADING) + "shift = scaled_residual:Shift\n"
    installed(folder, points, {"scaled_residual": code_of(PAGE, HEADING) + SHIFT})
