"""The zoo: toy models of every architecture, each with its sites counted by hand.

All have hidden size 32, 4 heads, 2 layers (per stack), feed-forwards of 64 and random weights. The counts come from
the authors' papers and code, never from what the library found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

VOCABULARY = 99
HIDDEN = 32
HEADS = 4
FEATURES = 64
IMAGE = 16
"""Width and height of the toy images, in patches of 4."""

Batch = dict[str, torch.Tensor]
Example = Callable[[int, int], Batch]
"""(batch, length) -> inputs by name."""


@dataclass(frozen=True)
class Expected:
    """The number of sites of each kind in a model. `gated`: whether its feed-forwards have a gate; `experts`: groups of
    experts; `layers`: layers in all stacks together."""

    attentions: int
    feedforwards: int
    norms: int
    embeddings: int
    linears: int
    layers: int
    gated: bool = False
    experts: int = 0
    kv_heads: int = HEADS
    cross: int = 0


@dataclass(frozen=True)
class Arch:
    """One toy architecture. `dynamic`: sizes that must stay dynamic; `lengths`: the two sequence lengths to try."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    example: Example
    expected: Expected
    dynamic: tuple[str, ...] = ("batch", "sequence")
    lengths: tuple[int, int] = (12, 21)
    notes: str = ""


def _quiet(config: Any) -> Any:
    """The configuration without any dropout."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.0)
    return config


def _build(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, model)(_quiet(getattr(transformers, config)(**options)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            # Default weights are so small that attention is uniform, biases are zeros and norms are ones:
            # mistakes would stay invisible.
            spread = 0.15 if parameter.dim() > 1 else 0.05
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return made  # type: ignore[no-any-return]


def _ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed + batch + length)
    )


def _mask(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length // 2 :] = 0
    return mask


def text(batch: int, length: int) -> Batch:
    """Token ids with padding in the last row."""
    return {"input_ids": _ids(batch, length), "attention_mask": _mask(batch, length)}


def plain_text(batch: int, length: int) -> Batch:
    """Token ids alone."""
    return {"input_ids": _ids(batch, length)}


def text_pair(batch: int, length: int) -> Batch:
    """A padded source, and a target of another length."""
    return {**text(batch, length), "decoder_input_ids": _ids(batch, length - 3, seed=7)}


def image(batch: int, length: int) -> Batch:
    """Images; `length` is not used."""
    return {
        "pixel_values": torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(batch))
    }


def wave(batch: int, length: int) -> Batch:
    """Raw audio."""
    return {"input_values": torch.randn(batch, 40 * length, generator=torch.Generator().manual_seed(batch))}


def spectrum_and_text(batch: int, length: int) -> Batch:
    """A spectrogram of fixed length and a target."""
    sound = torch.randn(batch, 8, 40, generator=torch.Generator().manual_seed(batch))
    return {"input_features": sound, "decoder_input_ids": _ids(batch, length)}


def spectrum(batch: int, length: int) -> Batch:
    """A spectrogram of fixed size."""
    return {"input_values": torch.randn(batch, 40, 16, generator=torch.Generator().manual_seed(batch))}


BERT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": FEATURES, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA_LIKE: dict[str, Any] = {**BERT_LIKE, "num_key_value_heads": 2, "pad_token_id": 0}
GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BART_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": FEATURES,
    "decoder_ffn_dim": FEATURES, "max_position_embeddings": 64, "pad_token_id": 0, "decoder_start_token_id": 2,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": FEATURES, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": HEADS, "decoder_start_token_id": 0,
}  # fmt: skip
VIT_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": FEATURES,
    "image_size": IMAGE, "patch_size": 4,
}  # fmt: skip
WAVE_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
    "intermediate_size": FEATURES, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False, "layerdrop": 0.0,
}  # fmt: skip

BOTH_LENGTHS = ("batch", "sequence", "sequence_2")

# linears per layer: attention 4 (q, k, v and o; 2 where q/k/v are fused), feed-forward 2 (3 where gated, 2 where
# gate and up are fused). A language model head adds one, a pooler one.
ZOO: tuple[Arch, ...] = (
    Arch("bert", "encoder", partial(_build, "BertModel", "BertConfig", **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=3, linears=13, layers=2)),
    Arch("roberta", "encoder", partial(_build, "RobertaModel", "RobertaConfig", **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=3, linears=13, layers=2)),
    Arch("distilbert", "encoder",
         partial(_build, "DistilBertModel", "DistilBertConfig", vocab_size=VOCABULARY, dim=HIDDEN, n_layers=2,
                 n_heads=HEADS, hidden_dim=FEATURES, max_position_embeddings=64), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=2, linears=12, layers=2)),
    Arch("albert", "encoder", partial(_build, "AlbertModel", "AlbertConfig", embedding_size=16, **BERT_LIKE), text,
         Expected(attentions=1, feedforwards=1, norms=3, embeddings=3, linears=8, layers=1),
         notes="one layer, used twice"),
    Arch("electra", "encoder", partial(_build, "ElectraModel", "ElectraConfig", embedding_size=HIDDEN, **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=3, linears=12, layers=2)),
    Arch("mpnet", "encoder", partial(_build, "MPNetModel", "MPNetConfig", **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=3, linears=13, layers=2),
         notes="one of the embeddings is of relative positions"),
    Arch("deberta_v2", "encoder",
         partial(_build, "DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"],
                 max_relative_positions=16, type_vocab_size=0, **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=2, linears=16, layers=2),
         notes="each layer projects relative positions to keys and queries"),
    Arch("modernbert", "encoder",
         partial(_build, "ModernBertModel", "ModernBertConfig", global_attn_every_n_layers=2, local_attention=8,
                 pad_token_id=0, **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=8, layers=2, gated=True),
         notes="the first layer has no norm before its attention"),
    Arch("gpt2", "decoder", partial(_build, "GPT2LMHeadModel", "GPT2Config", n_inner=FEATURES, **GPT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=2, linears=9, layers=2)),
    Arch("gpt_neox", "decoder", partial(_build, "GPTNeoXForCausalLM", "GPTNeoXConfig", **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=9, layers=2)),
    Arch("gptj", "decoder",
         partial(_build, "GPTJForCausalLM", "GPTJConfig", n_inner=FEATURES, rotary_dim=4, **GPT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=3, embeddings=1, linears=13, layers=2)),
    Arch("opt", "decoder",
         partial(_build, "OPTForCausalLM", "OPTConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=FEATURES,
                 num_hidden_layers=2, num_attention_heads=HEADS, max_position_embeddings=64,
                 word_embed_proj_dim=HIDDEN), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=2, linears=13, layers=2)),
    Arch("llama", "decoder", partial(_build, "LlamaForCausalLM", "LlamaConfig", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2)),
    Arch("mistral", "decoder", partial(_build, "MistralForCausalLM", "MistralConfig", sliding_window=8, **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2)),
    Arch("qwen2", "decoder", partial(_build, "Qwen2ForCausalLM", "Qwen2Config", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2)),
    Arch("qwen3", "decoder", partial(_build, "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=9, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2),
         notes="norms on queries and keys"),
    Arch("gemma", "decoder", partial(_build, "GemmaForCausalLM", "GemmaConfig", head_dim=8, **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2)),
    Arch("gemma2", "decoder",
         partial(_build, "Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
                 attn_implementation="eager", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=9, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2),
         notes="scores are capped by a tanh"),
    Arch("phi", "decoder", partial(_build, "PhiForCausalLM", "PhiConfig", **BERT_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=3, embeddings=1, linears=13, layers=2),
         notes="attention and feed-forward side by side"),
    Arch("phi3", "decoder", partial(_build, "Phi3ForCausalLM", "Phi3Config", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=9, layers=2, gated=True, kv_heads=2)),
    Arch("falcon", "decoder",
         partial(_build, "FalconForCausalLM", "FalconConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN,
                 num_hidden_layers=2, num_attention_heads=HEADS, ffn_hidden_size=FEATURES, bos_token_id=1, eos_token_id=2), text,
         Expected(attentions=2, feedforwards=2, norms=3, embeddings=1, linears=9, layers=2, kv_heads=1)),
    Arch("bloom", "decoder",
         partial(_build, "BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=2,
                 n_head=HEADS), text,
         Expected(attentions=2, feedforwards=2, norms=6, embeddings=1, linears=9, layers=2)),
    Arch("stablelm", "decoder", partial(_build, "StableLmForCausalLM", "StableLmConfig", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2)),
    Arch("olmo2", "decoder", partial(_build, "Olmo2ForCausalLM", "Olmo2Config", **LLAMA_LIKE), text,
         Expected(attentions=2, feedforwards=2, norms=9, embeddings=1, linears=15, layers=2, gated=True, kv_heads=2),
         notes="norms after each part, and on queries and keys"),
    Arch("t5", "encoder-decoder", partial(_build, "T5ForConditionalGeneration", "T5Config", **T5_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=12, embeddings=3, linears=33, layers=4, cross=2), BOTH_LENGTHS),
    Arch("t5_gated", "encoder-decoder",
         partial(_build, "T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", **T5_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=12, embeddings=3, linears=37, layers=4, gated=True, cross=2),
         BOTH_LENGTHS),
    Arch("bart", "encoder-decoder", partial(_build, "BartModel", "BartConfig", **BART_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=12, embeddings=3, linears=32, layers=4, cross=2), BOTH_LENGTHS),
    Arch("marian", "encoder-decoder", partial(_build, "MarianModel", "MarianConfig", **BART_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=10, embeddings=3, linears=32, layers=4, cross=2), BOTH_LENGTHS),
    Arch("pegasus", "encoder-decoder", partial(_build, "PegasusModel", "PegasusConfig", **BART_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=12, embeddings=3, linears=32, layers=4, cross=2), BOTH_LENGTHS),
    Arch("mbart", "encoder-decoder", partial(_build, "MBartModel", "MBartConfig", **BART_LIKE), text_pair,
         Expected(attentions=6, feedforwards=4, norms=14, embeddings=3, linears=32, layers=4, cross=2), BOTH_LENGTHS),
    Arch("mixtral", "mixture of experts",
         partial(_build, "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **LLAMA_LIKE),
         text,
         Expected(attentions=2, feedforwards=0, norms=5, embeddings=1, linears=11, layers=2, gated=True, kv_heads=2,
                  experts=2), notes="the router of each layer counts as a linear"),
    Arch("qwen2_moe", "mixture of experts",
         partial(_build, "Qwen2MoeForCausalLM", "Qwen2MoeConfig", num_experts=4,
                 num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=FEATURES, **LLAMA_LIKE),
         text,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=1, linears=19, layers=2, gated=True, kv_heads=2,
                  experts=2), notes="the feed-forwards are the shared experts, each with a gate of its own"),
    Arch("mamba", "state space",
         partial(_build, "MambaForCausalLM", "MambaConfig", vocab_size=VOCABULARY, hidden_size=HIDDEN,
                 num_hidden_layers=2, state_size=8), plain_text,
         Expected(attentions=0, feedforwards=0, norms=3, embeddings=1, linears=9, layers=2), ("batch",), (12, 12)),
    Arch("mamba2", "state space",
         partial(_build, "Mamba2ForCausalLM", "Mamba2Config", vocab_size=VOCABULARY, hidden_size=HIDDEN,
                 num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=4), plain_text,
         Expected(attentions=0, feedforwards=0, norms=5, embeddings=1, linears=5, layers=2), ("batch",), (12, 12)),
    Arch("vit", "vision", partial(_build, "ViTModel", "ViTConfig", **VIT_LIKE), image,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=0, linears=13, layers=2), ("batch",)),
    Arch("deit", "vision", partial(_build, "DeiTModel", "DeiTConfig", **VIT_LIKE), image,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=0, linears=13, layers=2), ("batch",)),
    Arch("clip_vision", "vision", partial(_build, "CLIPVisionModel", "CLIPVisionConfig", **VIT_LIKE), image,
         Expected(attentions=2, feedforwards=2, norms=6, embeddings=1, linears=12, layers=2), ("batch",)),
    Arch("dinov2", "vision", partial(_build, "Dinov2Model", "Dinov2Config", mlp_ratio=2, **VIT_LIKE), image,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=0, linears=12, layers=2), ("batch",)),
    Arch("whisper", "speech",
         partial(_build, "WhisperModel", "WhisperConfig", num_mel_bins=8, max_source_positions=20,
                 max_target_positions=64, **{k: v for k, v in BART_LIKE.items() if k != "max_position_embeddings"}),
         spectrum_and_text,
         Expected(attentions=6, feedforwards=4, norms=12, embeddings=3, linears=32, layers=4, cross=2),
         notes="tokens, and positions of both stacks"),
    Arch("wav2vec2", "speech", partial(_build, "Wav2Vec2Model", "Wav2Vec2Config", **WAVE_LIKE), wave,
         Expected(attentions=2, feedforwards=2, norms=7, embeddings=0, linears=13, layers=2),
         notes="one of the norms is a group norm"),
    Arch("hubert", "speech", partial(_build, "HubertModel", "HubertConfig", **WAVE_LIKE), wave,
         Expected(attentions=2, feedforwards=2, norms=7, embeddings=0, linears=13, layers=2),
         notes="one of the norms is a group norm"),
    Arch("spectrogram", "speech",
         partial(_build, "ASTModel", "ASTConfig", hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=HEADS,
                 intermediate_size=FEATURES, patch_size=8, frequency_stride=8, time_stride=8, max_length=40,
                 num_mel_bins=16), spectrum,
         Expected(attentions=2, feedforwards=2, norms=5, embeddings=0, linears=12, layers=2), ("batch",)),
)  # fmt: skip

BY_NAME: dict[str, Arch] = {arch.name: arch for arch in ZOO}
