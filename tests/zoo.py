"""Toy models of many architectures, with what must be found in each, counted by hand.

Every model has random weights, two layers (an encoder-decoder: two on each side) and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Arch:
    """`sites`: (attentions, heads, feed-forwards, gated, norms, embeddings); `dynamic`: batch and sequence both float."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    example: Callable[[int, int], Batch]
    sites: tuple[int, int, int, bool, int, int]
    dynamic: bool = True
    experts: int = 0
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 9), (3, 12))


def text(batch: int, length: int) -> Batch:
    """Token ids with a ragged mask."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(5, 90, (batch, length), generator=generator)
    kept = torch.tensor([length - row for row in range(batch)])
    return {"input_ids": ids, "attention_mask": (torch.arange(length)[None] < kept[:, None]).long()}


def pair(batch: int, length: int) -> Batch:
    """Token ids for an encoder and a decoder, the decoder's of another length."""
    given = text(batch, length)
    generator = torch.Generator().manual_seed(length)
    return {**given, "decoder_input_ids": torch.randint(5, 90, (batch, length - 3), generator=generator)}


def ids_alone(batch: int, length: int) -> Batch:
    return {"input_ids": text(batch, length)["input_ids"]}


def pixels(batch: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(batch)
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def sound(batch: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(batch)
    return {"input_values": torch.randn(batch, 800 + 40 * length, generator=generator)}


def mel(batch: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(batch)
    return {
        "input_features": torch.randn(batch, 16, 40, generator=generator),
        "decoder_input_ids": torch.randint(5, 90, (batch, length), generator=generator),
    }


def _make(config: str, model: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        for name, parameter in made.named_parameters():
            if (
                parameter.dim() >= 2
            ):  # the usual initial scale leaves attention flat, and hides mistakes in it
                nn.init.normal_(parameter, std=0.15 if "embed" not in name else 0.5)
        return made

    return build


BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
LLAMA = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
BART = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
        "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
      "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
       "patch_size": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip

ZOO: tuple[Arch, ...] = (
    Arch("bert", "encoder", _make("BertConfig", "BertModel", **BERT), text, (2, 4, 2, False, 5, 3)),
    Arch("roberta", "encoder", _make("RobertaConfig", "RobertaModel", **BERT), text, (2, 4, 2, False, 5, 3)),
    Arch("electra", "encoder", _make("ElectraConfig", "ElectraModel", **{**BERT, "embedding_size": 16}), text, (2, 4, 2, False, 5, 3)),
    Arch("albert", "encoder", _make("AlbertConfig", "AlbertModel", **{**BERT, "embedding_size": 16}), text, (1, 4, 1, False, 3, 3)),
    Arch("distilbert", "encoder", _make("DistilBertConfig", "DistilBertModel", vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
         max_position_embeddings=64, dropout=0.0, attention_dropout=0.0), text, (2, 4, 2, False, 5, 2)),
    Arch("mpnet", "encoder", _make("MPNetConfig", "MPNetModel", **BERT), text, (2, 4, 2, False, 5, 3)),
    Arch("modernbert", "encoder", _make("ModernBertConfig", "ModernBertModel", vocab_size=99, hidden_size=32, num_hidden_layers=2,
         num_attention_heads=4, intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
         sep_token_id=2), text, (2, 4, 2, True, 5, 1)),
    Arch("gpt2", "decoder", _make("GPT2Config", "GPT2LMHeadModel", vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64,
         resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2), text, (2, 4, 2, False, 5, 2)),
    Arch("gpt-neox", "decoder", _make("GPTNeoXConfig", "GPTNeoXForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2,
         num_attention_heads=4, intermediate_size=64, max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
         bos_token_id=1, eos_token_id=2), text, (2, 4, 2, False, 5, 1)),
    Arch("opt", "decoder", _make("OPTConfig", "OPTForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
         ffn_dim=64, max_position_embeddings=64, dropout=0.0, word_embed_proj_dim=32, pad_token_id=1, bos_token_id=2, eos_token_id=2),
         text, (2, 4, 2, False, 5, 2)),
    Arch("llama", "decoder", _make("LlamaConfig", "LlamaForCausalLM", **LLAMA), text, (2, 4, 2, True, 5, 1)),
    Arch("mistral", "decoder", _make("MistralConfig", "MistralForCausalLM", **LLAMA), text, (2, 4, 2, True, 5, 1)),
    Arch("qwen2", "decoder", _make("Qwen2Config", "Qwen2ForCausalLM", **LLAMA), text, (2, 4, 2, True, 5, 1)),
    Arch("qwen3", "decoder", _make("Qwen3Config", "Qwen3ForCausalLM", **{**LLAMA, "head_dim": 8}), text, (2, 4, 2, True, 9, 1)),
    Arch("gemma", "decoder", _make("GemmaConfig", "GemmaForCausalLM", **{**LLAMA, "head_dim": 8}), text, (2, 4, 2, True, 5, 1)),
    Arch("phi", "decoder", _make("PhiConfig", "PhiForCausalLM", **{**LLAMA, "num_key_value_heads": 4, "resid_pdrop": 0.0}), text, (2, 4, 2, False, 3, 1)),
    Arch("phi3", "decoder", _make("Phi3Config", "Phi3ForCausalLM", **LLAMA), text, (2, 4, 2, True, 5, 1)),
    Arch("stablelm", "decoder", _make("StableLmConfig", "StableLmForCausalLM", **LLAMA), text, (2, 4, 2, True, 5, 1)),
    Arch("olmo2", "decoder", _make("Olmo2Config", "Olmo2ForCausalLM", **LLAMA), text, (2, 4, 2, True, 9, 1)),
    Arch("falcon", "decoder", _make("FalconConfig", "FalconForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2,
         num_attention_heads=4, new_decoder_architecture=False, multi_query=True, bos_token_id=1, eos_token_id=2), text, (2, 4, 2, False, 3, 1)),
    Arch("bloom", "decoder", _make("BloomConfig", "BloomForCausalLM", vocab_size=99, hidden_size=32, n_layer=2, n_head=4,
         hidden_dropout=0.0, attention_dropout=0.0), text, (2, 4, 2, False, 6, 1)),
    Arch("t5", "encoder-decoder", _make("T5Config", "T5ForConditionalGeneration", **T5), pair, (6, 4, 4, False, 12, 3)),
    Arch("t5-gated", "encoder-decoder", _make("T5Config", "T5ForConditionalGeneration", **{**T5, "feed_forward_proj": "gated-gelu"}), pair,
         (6, 4, 4, True, 12, 3)),
    Arch("bart", "encoder-decoder", _make("BartConfig", "BartForConditionalGeneration", **BART), pair, (6, 4, 4, False, 12, 3)),
    Arch("pegasus", "encoder-decoder", _make("PegasusConfig", "PegasusForConditionalGeneration", **BART), pair, (6, 4, 4, False, 12, 3)),
    Arch("marian", "encoder-decoder", _make("MarianConfig", "MarianMTModel", **BART), pair, (6, 4, 4, False, 10, 3)),
    Arch("mixtral", "mixture", _make("MixtralConfig", "MixtralForCausalLM", **{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}), text,
         (2, 4, 0, False, 5, 1), experts=4),
    Arch("mamba", "state-space", _make("MambaConfig", "MambaModel", vocab_size=99, hidden_size=32, state_size=4, num_hidden_layers=2), ids_alone,
         (0, 0, 0, False, 3, 1), dynamic=False, sizes=((2, 9), (3, 9))),
    Arch("vit", "vision", _make("ViTConfig", "ViTModel", **VIT), pixels, (2, 4, 2, False, 5, 0), sizes=((2, 1), (3, 1))),
    Arch("deit", "vision", _make("DeiTConfig", "DeiTModel", **VIT), pixels, (2, 4, 2, False, 5, 0), sizes=((2, 1), (3, 1))),
    Arch("clip-vision", "vision", _make("CLIPVisionConfig", "CLIPVisionModel", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
         intermediate_size=64, image_size=32, patch_size=8), pixels, (2, 4, 2, False, 6, 1), sizes=((2, 1), (3, 1))),
    Arch("dinov2", "vision", _make("Dinov2Config", "Dinov2Model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2,
         image_size=32, patch_size=8), pixels, (2, 4, 2, False, 5, 0), sizes=((2, 1), (3, 1))),
    Arch("whisper", "speech", _make("WhisperConfig", "WhisperModel", vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2,
         encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16,
         max_source_positions=20, max_target_positions=64, dropout=0.0, pad_token_id=1, bos_token_id=2, eos_token_id=2,
         decoder_start_token_id=2, suppress_tokens=None, begin_suppress_tokens=None), mel, (6, 4, 4, False, 12, 3)),
    Arch("wav2vec2", "speech", _make("Wav2Vec2Config", "Wav2Vec2Model", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
         intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4), num_feat_extract_layers=2,
         num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
         activation_dropout=0.0, layerdrop=0.0, mask_time_prob=0.0, apply_spec_augment=False), sound, (2, 4, 2, False, 7, 0)),
)  # fmt: skip
