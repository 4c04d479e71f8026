"""Texts on the command line, continued with saved engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bmgraph.errors import InputError
from bmgraph.loading import load
from bmgraph.runtime.generation.generate import GeneratingEngine


def generated_texts(bundle: Path, prompts: Sequence[str], options: Mapping[str, Any]) -> Iterator[str]:
    """The answers of a saved engine to prompts, a line or more each, ids where it has no tokenizer: to a single prompt piece by piece, as they
    come, to several whole ones.

    Raises InputError for another bundle.
    """
    engine = load(bundle)
    if not isinstance(engine, GeneratingEngine):
        raise InputError(
            f"{bundle} does not generate: compile the model with --generate and the backend onnx"
        )
    writes = engine.tokenizer is not None
    given: list[Any] = [prompt if writes else _ids(prompt) for prompt in prompts]
    if len(given) > 1:
        for answer in engine.generate(given, **options):
            yield f"{answer if writes else ' '.join(map(str, answer))}\n"
        return
    for number, piece in enumerate(engine.generate(given[0], stream=True, **options)):
        yield str(piece) if writes or not number else f" {piece}"
    yield "\n"


def slides(window: int | None, keep: int) -> dict[str, Any]:
    """The options of `generate` for a window that slides, as the command line has them: 0 for all positions of the model."""
    return {"window": True if window == 0 else window, "keep": keep}


def _ids(prompt: str) -> list[int]:
    try:
        return [int(item) for item in prompt.split()]
    except ValueError:
        raise InputError(
            f"the engine has no tokenizer, and {prompt!r} is a text: give ids, such as '3 14 15', or compile a folder with "
            "a tokenizer"
        ) from None
