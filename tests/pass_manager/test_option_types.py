"""Options of another type than a pass says are refused, with the type that it wants."""

from __future__ import annotations

from typing import Any

import pytest

from bmgraph.errors import InputError
from bmgraph.pass_manager.pass_base import Pass
from bmgraph.passes import KVCache, LoRA, MoEfy, Prune, Quantize, Shrink, SoftPrompt


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (LoRA, {"r": 2.5}, r"option 'r' of LoRA is 2.5: give a whole number"),
        (LoRA, {"r": True}, r"option 'r' of LoRA is True: give a whole number"),
        (LoRA, {"alpha": "16"}, r"option 'alpha' of LoRA is '16': give a number"),
        (LoRA, {"targets": (1, 2)}, r"option 'targets' of LoRA is \(1, 2\): give a tuple, each item a text"),
        (Quantize, {"outliers": "no"}, r"option 'outliers' of Quantize is 'no': give true or false"),
        (Quantize, {"activations": 8}, r"option 'activations' of Quantize is 8: give a text or None"),
        (SoftPrompt, {"tokens": "20"}, r"option 'tokens' of SoftPrompt is '20': give a whole number"),
        (Shrink, {"ffn": "25%"}, r"option 'ffn' of Shrink is '25%': give a number"),
        (MoEfy, {"experts": 8.0}, r"option 'experts' of MoEfy is 8.0: give a whole number"),
        (Prune, {"include": None}, r"option 'include' of Prune is None: give a tuple, each item a text"),
    ],
)
def test_another_type_is_refused(kind: type[Pass], options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        kind(**options)


def test_what_fits_is_taken() -> None:
    assert LoRA(alpha=8).alpha == 8
    assert LoRA(targets="*.q").targets == ("*.q",)
    assert Quantize(include=["*.q"], activations=None).include == ("*.q",)
    assert Shrink(ffn=0, heads=0.5).heads == 0.5
    assert KVCache() == KVCache()
