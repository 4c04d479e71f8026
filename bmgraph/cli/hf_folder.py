"""Opens a Hugging Face folder: the model of the class that its config names, and its tokenizer if it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bmgraph.cli.config_fields import ConfigFields, processor_fields
from bmgraph.cli.hf_tokenizer import read_tokenizer
from bmgraph.cli.hf_weights import load_pretrained
from bmgraph.errors import InputError
from bmgraph.serialize.weight_files import read_json


@dataclass
class Folder:
    """What a folder holds: `fields` are the model's configuration, `processor` that of images and sounds."""

    model: nn.Module
    tokenizer: Any
    fields: ConfigFields
    processor: ConfigFields = field(default_factory=lambda: ConfigFields({}))
    notes: tuple[str, ...] = ()


def open_folder(folder: Path) -> Folder:
    """Read a folder; raises InputError, naming it, for one that is no model's, lacks a class, or cannot be read."""
    _check_is_model(folder)
    transformers = import_transformers()
    config = read_json(folder / "config.json")
    processor = processor_fields(folder)
    loader = _model_class(transformers, folder, config)
    model = load_pretrained(loader, folder, dtype=torch.float32)
    tokenizer = read_tokenizer(transformers, folder)
    return Folder(
        model,
        tokenizer,
        ConfigFields(model.config.to_dict()),
        processor,
        _notes(folder, config, model),
    )


def import_transformers() -> ModuleType:
    """transformers, without its messages; raises InputError if it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise InputError('reading this model needs transformers: pip install "bmgraph[hf]"') from error
    messages: Any = transformers.utils.logging
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    return transformers


def _check_is_model(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise InputError(
            f"{folder} holds a PEFT adapter of {base}, not a model: give the folder of that model, and put the adapter "
            "on it in Python with the pass LoadDelta"
        )
    raise InputError(f"{folder} holds no config.json: it is not a Hugging Face folder")


def _model_class(transformers: Any, folder: Path, config: dict[str, Any]) -> Any:
    """The class that the config names; the one of its model type, without a head, where it names none."""
    names = config.get("architectures") or []
    if not names:
        return transformers.AutoModel
    kind = getattr(transformers, str(names[0]), None)
    if kind is None:
        raise InputError(
            f"{folder} holds a {names[0]}, which transformers {transformers.__version__} does not have: write a function "
            "that returns the model and an example batch, and give it as module:function"
        )
    return kind


def _notes(folder: Path, config: dict[str, Any], model: nn.Module) -> tuple[str, ...]:
    notes = []
    if not config.get("architectures"):
        notes.append(
            f"{folder}/config.json names no class under 'architectures': taken as {type(model).__name__}, without a head"
        )
    return tuple(notes)
