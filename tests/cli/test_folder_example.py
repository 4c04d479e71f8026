"""Examples for folders of every task: the model's own class takes them, and they have the sizes of its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bmgraph.cli.calibration import calibration_batches
from bmgraph.cli.model_source import TEXTS, open_source
from bmgraph.errors import InputError
from bmgraph.serialize.safetensors_io import write_tensors
from tests.helpers.hf_folders import SEQ2SEQ, SMALL, T5, VISION, saved_folder

IMAGE = {**VISION, "image_size": 16, "patch_size": 8}
SPEECH = {
    **{**VISION, "vocab_size": 30}, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
CLIP = {
    "text_config": {**SMALL, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 0}, "vision_config": IMAGE,
    "projection_dim": 16,
}  # fmt: skip

FOLDERS: dict[str, tuple[str, dict[str, Any], bool, dict[str, tuple[int, ...]]]] = {
    "features": ("BertModel", SMALL, True, {"input_ids": (4, 22), "attention_mask": (4, 22)}),
    "short_positions": (
        "BertModel", {**SMALL, "max_position_embeddings": 8}, True, {"input_ids": (4, 8), "attention_mask": (4, 8)},
    ),
    "reserved_positions": (
        "RobertaForMaskedLM", {**SMALL, "max_position_embeddings": 14}, False,
        {"input_ids": (3, 12), "attention_mask": (3, 12)},
    ),
    "causal_lm": ("LlamaForCausalLM", SMALL, False, {"input_ids": (3, 14), "attention_mask": (3, 14)}),
    "sequence_classes": (
        "BertForSequenceClassification", SMALL, True,
        {"input_ids": (4, 22), "attention_mask": (4, 22), "token_type_ids": (4, 22)},
    ),
    "token_classes": ("BertForTokenClassification", SMALL, True, {"input_ids": (4, 22), "attention_mask": (4, 22)}),
    "answers": (
        "BertForQuestionAnswering", SMALL, True,
        {"input_ids": (4, 24), "attention_mask": (4, 24), "token_type_ids": (4, 24)},
    ),
    "choices": (
        "BertForMultipleChoice", SMALL, True,
        {"input_ids": (4, 2, 24), "attention_mask": (4, 2, 24), "token_type_ids": (4, 2, 24)},
    ),
    "seq2seq": (
        "T5ForConditionalGeneration", T5, True,
        {"input_ids": (4, 22), "attention_mask": (4, 22), "decoder_input_ids": (4, 23)},
    ),
    "seq2seq_by_config": (
        "T5ForConditionalGeneration", T5, False,
        {"input_ids": (3, 14), "attention_mask": (3, 14), "decoder_input_ids": (3, 9)},
    ),
    "seq2seq_classes": ("T5ForSequenceClassification", T5, False, {"input_ids": (3, 14), "attention_mask": (3, 14)}),
    "image_classes": ("ViTForImageClassification", IMAGE, False, {"pixel_values": (3, 3, 16, 16)}),
    "video_classes": (
        "VideoMAEForVideoClassification", {**IMAGE, "num_frames": 4}, False, {"pixel_values": (3, 4, 3, 16, 16)},
    ),
    "segments": (
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 16, "image_size": 64}, False,
        {"pixel_values": (3, 3, 64, 64)},
    ),
    "ctc": ("Wav2Vec2ForCTC", SPEECH, False, {"input_values": (3, 260)}),
    "sound_classes": (
        "ASTForAudioClassification", {**VISION, "max_length": 24, "num_mel_bins": 16, "patch_size": 8}, False,
        {"input_values": (3, 24, 16)},
    ),
    "speech_seq2seq": (
        "WhisperForConditionalGeneration",
        {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 24}, False,
        {"decoder_input_ids": (3, 9), "input_features": (3, 8, 40)},
    ),
    "speech_frames": (
        "Speech2TextForConditionalGeneration",
        {**SEQ2SEQ, "conv_channels": 16, "input_feat_per_channel": 8, "max_source_positions": 200}, False,
        {"decoder_input_ids": (3, 9), "input_features": (3, 50, 8)},
    ),
    "image_text": (
        "CLIPModel", CLIP, False, {"input_ids": (3, 14), "attention_mask": (3, 14), "pixel_values": (3, 3, 16, 16)},
    ),
    "series": (
        "PatchTSTForPrediction",
        {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16,
         "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "prediction_length": 8}, False,
        {"past_values": (3, 32, 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_the_model_of_a_folder_takes_its_example(tmp_path: Path, name: str) -> None:
    kind, config, tokenizer, shapes = FOLDERS[name]
    source = open_source(str(saved_folder(tmp_path / name, kind, config, tokenizer)))
    assert type(source.model).__name__ == kind
    assert {key: tuple(value.shape) for key, value in source.example.items()} == shapes
    assert source.notes == ()
    assert (source.batch_of is not None) == tokenizer
    with torch.no_grad():
        source.model(**source.example)


def test_a_decoder_s_ids_begin_with_the_id_that_generation_starts_with(tmp_path: Path) -> None:
    folder = saved_folder(tmp_path, "T5ForConditionalGeneration", T5, tokenizer=True)
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 6}')
    source = open_source(str(folder))
    ids, decoder_ids = source.example["input_ids"], source.example["decoder_input_ids"]
    assert decoder_ids[:, 0].tolist() == [6] * 4
    assert torch.equal(decoder_ids[:, 1:], ids)
    batch = source.batches(list(TEXTS[:2]), 2, 10)[0]
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (2, 10), "attention_mask": (2, 10), "decoder_input_ids": (2, 10),
    }  # fmt: skip


def test_image_sizes_come_from_the_processor_where_the_model_takes_any(tmp_path: Path) -> None:
    config = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    folder = saved_folder(tmp_path, "ResNetForImageClassification", config)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 48}}'
    )
    assert tuple(open_source(str(folder)).example["pixel_values"].shape) == (3, 3, 32, 48)


def test_what_a_folder_does_not_say_is_told(tmp_path: Path) -> None:
    folder = saved_folder(tmp_path / "bert", "BertModel", SMALL, tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.raises(InputError, match=r"holds no weights for cls\.predictions.*random values"):
        open_source(str(folder))
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    (note,) = open_source(str(folder)).notes
    assert "names no class under 'architectures': taken as BertModel" in note


def test_a_folder_without_an_example_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = saved_folder(tmp_path / "bert", "BertModel", SMALL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MyOwnModel"]}))
    with pytest.raises(
        InputError, match=r"holds a MyOwnModel, which transformers .* does not have: write a function"
    ):
        open_source(str(folder))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(
        InputError, match="PEFT adapter of some/base, not a model: give the folder of that model"
    ):
        open_source(str(tmp_path / "adapter"))


def test_a_model_without_text_is_calibrated_on_tensors(tmp_path: Path) -> None:
    source = open_source(str(saved_folder(tmp_path / "vit", "ViTForImageClassification", IMAGE)))
    assert calibration_batches(source, None, 16) == (None, "")
    (tmp_path / "texts.txt").write_text("one\n")
    with pytest.raises(
        InputError, match=r"reads no text, so it cannot be calibrated on .*texts\.txt: give a \.safetensors"
    ):
        calibration_batches(source, tmp_path / "texts.txt", 16)
    write_tensors(tmp_path / "batch.safetensors", source.example)
    batches, _ = calibration_batches(source, tmp_path / "batch.safetensors", 16)
    assert batches is not None
    assert torch.equal(batches[0]["pixel_values"], source.example["pixel_values"])
