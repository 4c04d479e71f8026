"""A Hugging Face folder gives its own weights or none: nothing is invented, left out, read from elsewhere or run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bmgraph.cli.hf_weights import load_pretrained
from bmgraph.errors import InputError
from bmgraph.serialize.weight_files import INDEX, WEIGHTS, check_regular_files

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as save_pretrained writes them: BERT as it is published (with the heads of its training), and a tied Llama."""
    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    pretraining = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    pretraining.save_pretrained(root / "bert")
    config = json.loads((root / "bert" / "config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]
    (root / "bert" / "config.json").write_text(json.dumps(config))
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    ).save_pretrained(root / "llama")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(
        root / "sharded", max_shard_size="2KB"
    )
    return root


def _load(folder: Path) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return load_pretrained(getattr(transformers, name), folder, dtype=torch.float32)


def test_whole_folders_are_read(folders: Path) -> None:
    """Tied weights are stored once; the heads of BERT's training are there although BertForMaskedLM has none of them."""
    assert isinstance(_load(folders / "bert"), transformers.BertForMaskedLM)
    llama = _load(folders / "llama")
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert (folders / "sharded" / INDEX).is_file()
    _load(folders / "sharded")


def _edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return run


def _config(**values: Any) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return run


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "generation_config.json.new")


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (
        _edit(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        r"holds no weights for model\.layers\.1\.mlp\.up_proj\.weight, which would get random values",
    ),
    "missing tied": (_edit(lambda tensors: tensors.pop("model.embed_tokens.weight")), "holds no weights for"),
    "more layers than weights": (_config(num_hidden_layers=3), r"holds no weights for model\.layers\.2"),
    "fewer layers than weights": (_config(num_hidden_layers=1), r"holds weights for model\.layers\.1.* does not have"),
    "unexpected": (_edit(lambda tensors: tensors.update(extra=torch.ones(2))), "holds weights for extra, which"),
    "other shape": (
        _edit(lambda tensors: tensors.update({"model.norm.weight": torch.ones(9)})),
        r"model\.norm\.weight of shape \[9\], but its config\.json says \[8\]",
    ),
    "pipe": (_pipe, "is not a regular file"),
    "pickled": (_pickled, r"pytorch_model\.bin, which is pickled and can run code"),
    "adapter": (_adapter, "holds both a model and a PEFT adapter"),
    "weights elsewhere": (_config(transformers_weights="../x.safetensors"), "names the file of weights '../x"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 900), "cannot be read"),
    "no model": (_config(architectures=["AutoTokenizer"]), "names a class under 'architectures' that is not a model"),
    "odd size": (_config(hidden_size="x"), "cannot be read"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "there are no weights to read"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_refused(name: str, folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "llama"))
    change, message = ODD[name]
    change(folder)
    with pytest.raises(InputError, match=message):
        _load(folder)


@pytest.mark.parametrize(
    "name", ["../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "gone.safetensors"]
)
def test_an_index_that_points_elsewhere_is_refused(name: str, folders: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders / "sharded", tmp_path / "sharded"))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names the file of weights|lacks gone"):
        _load(folder)


def test_a_folder_of_links_is_read_and_a_dangling_one_told(folders: Path, tmp_path: Path) -> None:
    """The cache of downloads holds links to the files."""
    for file in (folders / "llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    _load(tmp_path)
    (tmp_path / "vocab.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"vocab\.json cannot be read"):
        check_regular_files(tmp_path)


def test_names_of_labels_are_no_counts(folders: Path, tmp_path: Path) -> None:
    """A folder without a head may keep the names of more labels than it has rows of weights."""
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "llama"))
    _config(label2id={"blockhouse": 20_000}, id2label={"20000": "blockhouse"})(folder)
    _load(folder)
