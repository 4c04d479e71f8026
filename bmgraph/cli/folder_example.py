"""Makes an example batch for the model of a folder: which inputs it takes, and their values by name.

Which inputs: the main input that transformers declares for the class, the other modality of a model with two, forward's
required arguments, the decoder's ids of an encoder-decoder. Text goes through the folder's tokenizer; without one, ids
are random below the vocabulary. Images and sounds are noise of the sizes that the configuration and the processor name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from bmgraph.cli.hf_folder import Folder
from bmgraph.cli.hf_tokenizer import told
from bmgraph.cli.noise_inputs import MAKERS, Sizes
from bmgraph.errors import InputError

Batch = dict[str, torch.Tensor]

IDS, MASK, SEGMENTS, DECODER_IDS = "input_ids", "attention_mask", "token_type_ids", "decoder_input_ids"

PAIR_TASKS = ("QUESTION_ANSWERING", "NEXT_SENTENCE_PREDICTION", "MULTIPLE_CHOICE")
"""Tasks on pairs of texts, by the names of transformers' tables."""

SEGMENT_TASKS = (*PAIR_TASKS, "SEQUENCE_CLASSIFICATION")
"""Tasks whose texts may be pairs: the program also takes which of the two a token is of, where the model does."""

OWN_DECODER_TASKS = ("SEQUENCE_CLASSIFICATION", "QUESTION_ANSWERING", "TOKEN_CLASSIFICATION")
"""Tasks for which an encoder-decoder makes its decoder's ids itself."""

CHOICES = 2
ROWS, LENGTH, DECODER_LENGTH = 3, 14, 9
"""Rows, ids and decoder ids of an example without texts: sizes that differ, so that none is taken for another."""

POSITION_FIELDS = (
    "max_position_embeddings", "n_positions", "max_target_positions", "max_encoder_position_embeddings",
    "max_decoder_position_embeddings", "max_seq_len", "max_sequence_length",
)  # fmt: skip

IMAGE_TOKEN_FIELDS = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "audio_token_id",
    "audio_token_index",
)
"""Fields of models that read images or sounds in the place of certain ids of a text."""


class FolderExample:
    """Makes batches for the model of a folder; `length` bounds the tokens of a text. Raises InputError where it cannot."""

    def __init__(self, folder: Folder, length: int) -> None:
        self._model, self._tokenizer, self._fields = folder.model, folder.tokenizer, folder.fields
        self._sizes = Sizes(folder.fields, folder.processor, ROWS, type(folder.model).__name__)
        self._parameters = inspect.signature(folder.model.forward).parameters
        self.length = self._longest(length)
        self.notes: tuple[str, ...] = ()
        self.names = self._wanted()
        if self._tokenizer is not None and self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.convert_ids_to_tokens(0)

    @property
    def reads_text(self) -> bool:
        """Whether batches can be made of texts."""
        return self._tokenizer is not None and IDS in self.names

    def of_texts(self, texts: Sequence[str], length: int | None = None) -> Batch:
        """A batch of the texts, padded on the side and with the id of the tokenizer, with noise for all other inputs."""
        length = min(length or self.length, self.length)
        batch = self._choices(texts, length) if self._does("MULTIPLE_CHOICE") else self._texts(texts, length)
        if DECODER_IDS in self.names:
            batch[DECODER_IDS] = self._behind_start(self._tokens(list(texts), max(length - 1, 1))[IDS])
        return batch | self._noise(len(texts))

    def of_noise(self) -> Batch:
        """A batch by the configuration alone."""
        batch: Batch = {}
        if IDS in self.names:
            shape = (
                (ROWS, CHOICES, self._fit(LENGTH))
                if self._does("MULTIPLE_CHOICE")
                else (ROWS, self._fit(LENGTH))
            )
            batch[IDS] = self._ids(shape)
            if MASK in self.names:
                batch[MASK] = torch.ones_like(batch[IDS])
            if SEGMENTS in self.names:
                batch[SEGMENTS] = torch.zeros_like(batch[IDS])
        if DECODER_IDS in self.names:
            batch[DECODER_IDS] = self._behind_start(self._ids((ROWS, max(self._fit(DECODER_LENGTH) - 1, 1))))
        return batch | self._noise(ROWS)

    def _wanted(self) -> list[str]:
        """The names of the example's inputs."""
        main: Any = getattr(self._model, "main_input_name", IDS)
        names = dict.fromkeys([main] if isinstance(main, str) else main)
        names |= dict.fromkeys(self._other_modalities())
        names |= dict.fromkeys(
            name
            for name, item in self._parameters.items()
            if item.default is inspect.Parameter.empty
            and item.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        )
        if IDS in names:
            beside = (MASK, SEGMENTS) if self._tells_segments else (MASK,)
            names |= dict.fromkeys(name for name in beside if name in self._parameters)
        if self._decodes:
            names[DECODER_IDS] = None
        unknown = [
            name for name in names if name not in MAKERS and name not in (IDS, MASK, SEGMENTS, DECODER_IDS)
        ]
        if unknown:
            raise InputError(
                f"{type(self._model).__name__} takes {', '.join(map(repr, unknown))}, for which no example can be made "
                "from a folder: write a function that returns the model and an example batch, and give it as "
                "module:function"
            )
        return list(names)

    def _other_modalities(self) -> list[str]:
        """The inputs of the modalities beside the main one, such as the images of a model of texts and images."""
        kinds: Any = getattr(self._model, "input_modalities", ())
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        if len(kinds) < 2:
            return []
        if self._fields.get(*IMAGE_TOKEN_FIELDS) is not None and IDS in self._parameters:
            self.notes = (
                f"{type(self._model).__name__} is captured for text alone: for its other inputs write a function that "
                "returns the model and an example batch, and give it as module:function",
            )
            return [IDS]
        by_kind = {"text": (IDS,), "image": ("pixel_values",), "audio": ("input_features", "input_values")}
        return [name for kind in kinds for name in by_kind.get(kind, ()) if name in self._parameters]

    @property
    def _decodes(self) -> bool:
        config: Any = self._model.config
        takes = DECODER_IDS in self._parameters and bool(getattr(config, "is_encoder_decoder", False))
        return takes and not any(map(self._does, OWN_DECODER_TASKS))

    @property
    def _tells_segments(self) -> bool:
        """Whether texts may be pairs, and the tokenizer, if there is one, tells which of the two a token is of."""
        tells = self._tokenizer is None or SEGMENTS in self._tokenizer.model_input_names
        return tells and any(map(self._does, SEGMENT_TASKS))

    def _does(self, task: str) -> bool:
        """Whether the model's class is in transformers' table of a task."""
        from transformers.models.auto import modeling_auto

        table: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        name = type(self._model).__name__
        return any(name == item or (isinstance(item, tuple) and name in item) for item in table.values())

    def _texts(self, texts: Sequence[str], length: int) -> Batch:
        second = [*texts[1:], texts[0]] if any(map(self._does, PAIR_TASKS)) else None
        return self._tokens(list(texts), length, second)

    def _choices(self, texts: Sequence[str], length: int) -> Batch:
        """Each text with its choices, [B, choices, S]."""
        first = [text for text in texts for _ in range(CHOICES)]
        second = [
            texts[(row + 1 + choice) % len(texts)] for row in range(len(texts)) for choice in range(CHOICES)
        ]
        found = self._tokens(first, length, second)
        return {name: value.reshape(len(texts), CHOICES, -1) for name, value in found.items()}

    def _tokens(self, texts: list[str], length: int, second: list[str] | None = None) -> Batch:
        with told(type(self._model).__name__):
            found = self._tokenizer(
                texts, second, padding=True, truncation=True, max_length=length, return_tensors="pt",
                return_attention_mask=MASK in self.names, return_token_type_ids=SEGMENTS in self.names,
            )  # fmt: skip
        embeddings: Any = getattr(self._model, "get_input_embeddings", None)
        table = embeddings() if callable(embeddings) else None
        highest = int(found[IDS].max())
        if isinstance(table, nn.Embedding) and highest >= table.num_embeddings:
            raise InputError(
                f"the folder's tokenizer makes the id {highest}, but its model has the ids 0 to {table.num_embeddings - 1}: "
                "take model and tokenizer of one folder"
            )
        return {name: found[name] for name in (IDS, MASK, SEGMENTS) if name in found and name in self.names}

    def _noise(self, rows: int) -> Batch:
        return {name: MAKERS[name](self._sizes.of(rows)) for name in self.names if name in MAKERS}

    def _behind_start(self, ids: torch.Tensor) -> torch.Tensor:
        """Targets as a decoder reads them: behind the id that it starts with."""
        return torch.cat([torch.full_like(ids[:, :1], self._start), ids], 1)

    @cached_property
    def _start(self) -> int:
        generation = getattr(self._model, "generation_config", None)
        found = getattr(generation, "decoder_start_token_id", None)
        if found is None:
            found = self._fields.get("decoder_start_token_id", "bos_token_id", "pad_token_id")
        return int(found or 0)

    def _ids(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Random ids without those that have a meaning of their own, such as padding."""
        vocabulary = self._fields.number("vocab_size", "n_vocab", "vocabulary_size", otherwise=1000)
        table = next(
            (
                item
                for item in self._model.modules()
                if isinstance(item, nn.Embedding) and item.num_embeddings == vocabulary
            ),
            None,
        )
        special = {
            0,
            1,
            2,
            *(self._fields.get(name) for name in ("pad_token_id", "eos_token_id", "mask_token_id")),
        }
        special |= {table.padding_idx if table is not None else None}
        plain = [item for item in range(min(vocabulary, 30_000)) if item not in special] or [0]
        picked = torch.randint(len(plain), shape, generator=torch.Generator().manual_seed(0))
        ids = torch.tensor(plain)[picked]
        end = self._fields.get("eos_token_id")
        if isinstance(end, int) and 0 <= end < vocabulary:
            ids[..., -1] = end  # models that pool at the end, or split there, need exactly one
        return ids

    def _fit(self, length: int) -> int:
        return max(min(length, self.length), 1)

    def _longest(self, length: int) -> int:
        """The tokens of a text at most: what the tokenizer, the configuration and the tables of positions allow."""
        limits = [length]
        declared = getattr(self._tokenizer, "model_max_length", None)
        limits += [declared] if declared else []
        for name in POSITION_FIELDS:
            found = self._fields.number(name)
            if found > 0:
                limits.append(found - self._reserved_positions(found))
        return max(min(limits), 1)

    def _reserved_positions(self, rows: int) -> int:
        """The rows that a table of positions keeps for padding and below: positions count from behind them."""
        return max(
            (
                item.padding_idx + 1
                for item in self._model.modules()
                if isinstance(item, nn.Embedding)
                and item.num_embeddings == rows
                and item.padding_idx is not None
            ),
            default=0,
        )
