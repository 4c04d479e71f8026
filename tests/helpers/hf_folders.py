"""Toy Hugging Face folders, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "the",
    "museum",
    "opens",
    "at",
    "nine",
    "in",
    "morning",
    "and",
    "how",
    "do",
    "i",
)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 24, "vocab_size": 40,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 7,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    key: SMALL[key]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
}
T5 = {
    "vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 5,
    "eos_token_id": 3, "pad_token_id": 0,
}  # fmt: skip


def tiny_tokenizer() -> Any:
    """A tokenizer of 15 words that makes pairs and segments as BERT's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=library, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def saved_folder(
    path: Path, kind: str, config: dict[str, Any], tokenizer: bool = False, **parts: Any
) -> Path:
    """A model of the class `kind` of transformers with random weights, saved in `path`."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**config, **parts)).eval()
    model.save_pretrained(path)
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return path
