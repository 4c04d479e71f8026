"""Texts on the command line, continued with saved engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bmgraph.errors import InputError
from bmgraph.loading import load
from bmgraph.runtime.generation.generate import GeneratingEngine


def generate_texts(bundle: Path, prompts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """The answers of a saved engine to prompts; ids where it has no tokenizer. Raises InputError for another bundle."""
    engine = load(bundle)
    if not isinstance(engine, GeneratingEngine):
        raise InputError(
            f"{bundle} does not generate: compile the model with --generate and the backend onnx"
        )
    if engine.tokenizer is not None:
        return [str(answer) for answer in engine.generate(list(prompts), **options)]
    answers = engine.generate([_ids(prompt) for prompt in prompts], **options)
    return [" ".join(map(str, answer)) for answer in answers]


def _ids(prompt: str) -> list[int]:
    try:
        return [int(item) for item in prompt.split()]
    except ValueError:
        raise InputError(
            f"the engine has no tokenizer, and {prompt!r} is a text: give ids, such as '3 14 15', or compile a folder with "
            "a tokenizer"
        ) from None
