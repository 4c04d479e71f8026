"""Tasks on models of transformers: the same classes and losses as a loop written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import bmgraph as bg
from bmgraph.backends import SGD, Onnx, Torch
from bmgraph.passes import LoRA, Quantize
from bmgraph.prompting import Classify, Template, Verbalizer
from tests.helpers.prompting import byte_tokenizer, numbered_tokenizer, word_tokenizer

ROWS = [
    {"text_a": "A fine film.", "label": "positive"},
    {"text_a": "w1 w2 bad", "label": "negative"},
    {"text_a": "ok", "label": "positive"},
]
TEXTS = [row["text_a"] for row in ROWS]


def decoder() -> tuple[Any, Any, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config).eval(), tokenizer, {}


def encoder() -> tuple[Any, Any, dict[str, Any]]:
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), mask_token="[MASK]", pad_token="[PAD]", unk_token="[UNK]"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=32,
        **sizes,
    )
    return BertForMaskedLM(config).eval(), tokenizer, {"segments": True}


def encoder_decoder() -> tuple[Any, Any, dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=numbered_tokenizer(), pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    config = T5Config(
        dropout_rate=0.0,
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval(), tokenizer, {"model": "encoder-decoder", "start": 0}


def by_hand(model: Any, tokenizer: Any, text: str, kind: str, words: list[int]) -> torch.Tensor:
    """Log-probabilities of the words for one text, without any code of tasks."""
    if kind == "decoder":
        ids = tokenizer(f"{text} is", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.log_softmax(model(ids).logits[0, -1, words], 0)
    if kind == "encoder":
        ids = tokenizer(f"{text} is [MASK].", return_tensors="pt")["input_ids"]
        place = int((ids[0] == tokenizer.mask_token_id).nonzero())
        return torch.log_softmax(model(ids).logits[0, place, words], 0)
    ids = tokenizer(f"{text} is <x_0>.", return_tensors="pt")["input_ids"]
    decoder = torch.tensor([[0, tokenizer.convert_tokens_to_ids("<x_0>")]])
    return torch.log_softmax(model(ids, decoder_input_ids=decoder).logits[0, 1, words], 0)


@pytest.mark.slow
@pytest.mark.parametrize("build", [decoder, encoder, encoder_decoder])
def test_classes_and_losses_are_those_of_a_loop_by_hand(build: Any) -> None:
    torch.manual_seed(0)
    model, tokenizer, options = build()
    good, bad = ("great", "bad") if build is not decoder else ("good", "bad")
    verbalizer = Verbalizer({"positive": good, "negative": bad}, tokenizer)
    task = Classify(Template('{"placeholder": "text_a"} is {"mask"}.', tokenizer), verbalizer, **options)
    words = [ids[0][0] for ids in verbalizer.table.ids]
    with torch.no_grad():
        expected = torch.stack([by_hand(model, tokenizer, text, task.model, words) for text in TEXTS])
    trainer = bg.compile(
        model, example=task.batch(ROWS), backend=Torch(optimizer=SGD(lr=0.1, momentum=0.0), loss=task.loss)
    )
    engine = bg.compile(model, example=task.batch(TEXTS), backend="onnx", resources={"task": task})
    torch.testing.assert_close(engine.class_probabilities(TEXTS), expected.exp(), rtol=1e-4, atol=1e-6)
    loss = float(cross_entropy(expected, torch.tensor([0, 1, 0])))
    losses = [trainer.step(task.batch(ROWS)).loss for _ in range(2)]
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert losses[1] < losses[0]


@pytest.mark.slow
def test_a_tuned_task_on_int8_is_saved_and_scores_one_position(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, tokenizer, _ = decoder()
    verbalizer = Verbalizer({"positive": "good", "negative": "bad"}, tokenizer)
    task = Classify(Template('{"placeholder": "text_a"} is {"mask"}.', tokenizer), verbalizer)
    trainer = bg.compile(
        model, passes=[LoRA(r=2, targets="*.q_proj")], example=task.batch(ROWS),
        backend=Torch(optimizer=SGD(lr=0.1), loss=task.loss),
    )  # fmt: skip
    trainer.step(task.batch(ROWS))
    tuned = bg.compile(
        trainer.program(),
        passes=[Quantize("int8", activations="none")],
        backend="onnx",
        resources={"task": task},
    )
    tuned.save(tmp_path / "engine")
    loaded: Any = bg.load(tmp_path / "engine")
    assert torch.equal(loaded.class_probabilities(TEXTS), tuned.class_probabilities(TEXTS))
    cached = bg.compile(
        model, example=task.batch(TEXTS), backend=Onnx(generate=True), resources={"task": task}
    )
    words = [ids[0][0] for ids in verbalizer.table.ids]
    with torch.no_grad():
        expected = torch.stack([by_hand(model, tokenizer, text, "decoder", words) for text in TEXTS])
    torch.testing.assert_close(cached.class_probabilities(TEXTS), expected.exp(), rtol=1e-4, atol=1e-6)
