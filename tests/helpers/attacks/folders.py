"""Hostile folders of models: each is refused, or gives the model whose weights its files hold."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bmgraph.serialize.weight_files import INDEX, WEIGHTS
from tests.helpers.attacks.changes import (
    Change,
    both,
    cut,
    header,
    linked,
    piped,
    removed,
    say,
    tensors,
    written,
)
from tests.helpers.bundles import edit_json
from tests.helpers.hf_folders import SMALL, saved_folder

CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
)  # fmt: skip
MARK = "was_run"
"""A file that code of a folder would leave beside it."""

CODE = f"""
import pathlib
pathlib.Path(__file__).parent.joinpath("{MARK}").touch()
pathlib.Path("/tmp/{MARK}").touch()
raise SystemExit("run")
"""
NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def original(folder: Path) -> list[Path]:
    """A folder with one file of weights, and one with several."""
    import transformers

    one = saved_folder(folder / "one", "LlamaForCausalLM", SMALL, tokenizer=True)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.save_pretrained(folder / "several", max_shard_size="20KB")
    shutil.copy(one / TOKENIZER, folder / "several")
    shutil.copy(one / TOKENIZER_CONFIG, folder / "several")
    return [one, folder / "several"]


def _set(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return tensors(WEIGHTS, lambda found: found.update({name: make(found[name])}))


def _index(name: str, file: str) -> Change:
    return lambda folder: edit_json(folder / INDEX, lambda value: value["weight_map"].update({name: file}))


def _shard_twice(folder: Path) -> None:
    """Another shard holds a weight too, with other values."""
    first, other = sorted(folder.glob("model-*.safetensors"))[:2]
    name = next(
        name
        for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
        if file == first.name
    )
    held = {}
    tensors(first.name, lambda found: held.update({name: found[name] + 1}))(folder)
    tensors(other.name, lambda found: found.update(held))(folder)


def _without_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def _shard(change: Callable[[str], Change]) -> Change:
    return lambda folder: change(sorted(folder.glob("model-*.safetensors"))[0].name)(folder)


def _bare_header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _remote(**fields: Any) -> Change:
    code = {
        "auto_map": {
            name: f"mine.{name}"
            for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
        }
    }
    return both(written("mine.py", CODE.encode()), say(CONFIG, **code, **fields))


def _deep(count: int) -> bytes:
    return b'{"a":' * count + b"1" + b"}" * count


def _words(edit: Callable[[Any], object]) -> Change:
    return lambda folder: edit_json(folder / TOKENIZER, edit)


ONE: dict[str, Change] = {
    "a weight missing": tensors(WEIGHTS, lambda found: found.pop(UP)),
    "a weight more": tensors(WEIGHTS, lambda found: found.update(more=torch.ones(3))),
    "a weight of another shape": _set(UP, lambda value: value.T),
    "a weight of fewer axes": _set(UP, lambda value: value.reshape(-1)),
    "a weight of integers": _set(UP, lambda value: (value * 100).int()),
    "a weight of bytes": _set(UP, lambda value: (value * 100).to(torch.uint8)),
    "a complex weight": _set(UP, lambda value: value.to(torch.complex64)),
    "a weight of 8 bits": _set(UP, lambda value: value.to(torch.float8_e4m3fn)),
    "a weight of 64 bits": _set(UP, lambda value: value.double()),
    "a weight that is NaN": _set(NORM, lambda value: torch.full_like(value, float("nan"))),
    "an empty weight": _set(UP, lambda value: value[:0]),
    "half of the weights": cut(WEIGHTS),
    "no bytes": written(WEIGHTS, b""),
    "weights that overlap": header(WEIGHTS, lambda found: found[UP].update(data_offsets=found["model.layers.0.mlp.gate_proj.weight"]["data_offsets"])),
    "a shape that lies": header(WEIGHTS, lambda found: found[UP].update(shape=[2**40, 2**40])),
    "a header beyond the file": written(WEIGHTS, _bare_header(b"{}", 2**62)),
    "a header of 90 MB": written(WEIGHTS, _bare_header(b"{" + b" " * 90_000_000 + b"}")),
    "a header of many tensors": written(
        WEIGHTS,
        _bare_header(json.dumps({f"m{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}).encode()),
    ),
    "weights that are a pipe": piped(WEIGHTS),
    "weights that are a device": linked(WEIGHTS, "/dev/zero"),
    "weights that are a link to themselves": linked(WEIGHTS, WEIGHTS),
    "pickled weights alone": both(removed(WEIGHTS), written("pytorch_model.bin", b"\x80\x04.")),
    "a configuration that is a pipe": piped(CONFIG),
    "a configuration that is deep": written(CONFIG, _deep(100_000)),
    "a configuration that is wide": written(CONFIG, b'{"a": [' + b"[]," * 9_000_000 + b"0]}"),
    "a configuration that repeats a key": written(CONFIG, b'{"architectures": ["LlamaForCausalLM"], "architectures": ["BertModel"]}'),
    "a configuration of control characters": say(CONFIG, architectures=["\x1b[2J"]),
    "weights elsewhere": say(CONFIG, transformers_weights="/etc/passwd"),
    "more layers than weights": say(CONFIG, num_hidden_layers=3),
    "no layers": say(CONFIG, num_hidden_layers=0),
    "layers below 0": say(CONFIG, num_hidden_layers=-1),
    "a billion layers": say(CONFIG, num_hidden_layers=10**9),
    "ten million layers": say(CONFIG, num_hidden_layers=10**7),
    "a billion words": say(CONFIG, vocab_size=10**9),
    "a width of 2**40": say(CONFIG, hidden_size=2**40, head_dim=8),
    "an inner width of 2**31": say(CONFIG, intermediate_size=2**31),
    "a million heads": say(CONFIG, num_attention_heads=10**6, num_key_value_heads=10**6),
    "no heads": say(CONFIG, num_attention_heads=0),
    "a head of 2**40": say(CONFIG, head_dim=2**40),
    "a billion positions": say(CONFIG, max_position_embeddings=10**9),
    "a billion labels": say(CONFIG, num_labels=10**9),
    "sizes of text": say(CONFIG, hidden_size="32"),
    "sizes of fractions": say(CONFIG, hidden_size=32.0, num_hidden_layers=1.0),
    "another activation": say(CONFIG, hidden_act="os.system"),
    "an unknown rotation": say(CONFIG, rope_scaling={"rope_type": "x", "factor": 1e308}, rope_parameters={"rope_type": "x"}),
    "another family": say(CONFIG, architectures=["BertForMaskedLM"], model_type="bert"),
    "an unknown family": say(CONFIG, architectures=["NotThere"], model_type="not_there"),
    "a class that is no model": say(CONFIG, architectures=["Trainer"]),
    "a class of a module": say(CONFIG, architectures=["utils.import_utils"]),
    "code of the folder": _remote(),
    "code of the folder for an unknown family": _remote(model_type="mine"),
    "code of the folder for the tokenizer": both(
        written("mine.py", CODE.encode()), say(TOKENIZER_CONFIG, auto_map={"AutoTokenizer": ["mine.Slow", "mine.Fast"]}, tokenizer_class="Mine")
    ),
    "code of the folder for generation": both(
        written("generate.py", CODE.encode()),
        say(GENERATION, custom_generate="."),
    ),
    "quantised weights": say(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "quantised weights of no kind": say(CONFIG, quantization_config={"quant_method": "x"}),
    "a tokenizer that is noise": written(TOKENIZER, bytes(range(256)) * 100),
    "a tokenizer that is deep": written(TOKENIZER, _deep(200_000)),
    "a tokenizer that is wide": written(TOKENIZER, b'{"a": [' + b"[]," * 9_000_000 + b"0]}"),
    "a tokenizer of wrong types": _words(lambda value: value.update(model={"type": "BPE", "vocab": [], "merges": {}})),
    "a tokenizer of large ids": _words(lambda value: value["model"]["vocab"].update(museum=2**31)),
    "a tokenizer of a slow expression": _words(
        lambda value: value.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$|(.*)*x"}, "behavior": "Isolated", "invert": False})
    ),
    "a tokenizer that pads to a billion": _words(
        lambda value: value.update(padding={"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"})
    ),
    "a tokenizer that pads to a multiple": _words(
        lambda value: value.update(padding={"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": 10**9, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"})
    ),
    "a tokenizer that is a pipe": piped(TOKENIZER),
    "a tokenizer of another class": say(TOKENIZER_CONFIG, tokenizer_class="PreTrainedTokenizerBase"),
    "a tokenizer configuration of no object": written(TOKENIZER_CONFIG, b"[]"),
    "a tokenizer of no length": say(TOKENIZER_CONFIG, model_max_length=-5),
    "a tokenizer of a vast length": say(TOKENIZER_CONFIG, model_max_length=10**400),
    "a generation configuration of no object": written(GENERATION, b"[1]"),
    "a generation configuration of wrong types": say(GENERATION, eos_token_id={"a": 1}, max_length="x"),
    "an adapter beside the model": written("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "/etc"}'),
    "a processor of vast images": written("preprocessor_config.json", b'{"size": {"height": 1000000000, "width": 1000000000}}'),
}  # fmt: skip
SEVERAL: dict[str, Change] = {
    "an index out of the folder": _index(NORM, "../one/model.safetensors"),
    "an index of an absolute path": _index(NORM, "/etc/passwd"),
    "an index of a hidden file": _index(NORM, ".cache"),
    "an index of a pickled file": both(written("x.bin", b"\x80\x04."), _index(NORM, "x.bin")),
    "an index of no file": _index(NORM, "gone.safetensors"),
    "an index of numbers": lambda folder: edit_json(folder / INDEX, lambda value: value["weight_map"].update({NORM: 5})),
    "an index of lists": say(INDEX, weight_map=[["a", "b"]]),
    "an index that is deep": written(INDEX, _deep(100_000)),
    "an index without a weight": lambda folder: edit_json(folder / INDEX, lambda value: value["weight_map"].pop(NORM) and None),
    "an index of the wrong file": lambda folder: _index(NORM, sorted(folder.glob("model-*.safetensors"))[0].name)(folder),
    "a weight in two files": _shard_twice,
    "a file missing": _without_shard,
    "a file that is cut": _shard(cut),
    "a file that is a pipe": _shard(piped),
    "a file that is a link elsewhere": _shard(lambda name: linked(name, "/etc/passwd")),
    "a file of tensors that it should not have": _shard(lambda name: tensors(name, lambda found: found.update(more=torch.ones(2)))),
}  # fmt: skip
CASES: dict[str, Change] = {**ONE, **SEVERAL}
"""Name of an attack -> what it changes in a folder with one file of weights, or with several."""

HARMLESS = {
    "a weight of 64 bits", "code of the folder", "code of the folder for the tokenizer", "code of the folder for generation",
    "a tokenizer of a slow expression", "a tokenizer that pads to a multiple", "a tokenizer that pads to a billion",
    "a tokenizer of another class", "a tokenizer of no length", "a generation configuration of wrong types",
    "a processor of vast images", "a billion positions", "a weight that is NaN", "a configuration that repeats a key",
    "code of the folder for an unknown family", "quantised weights of no kind", "a tokenizer of a vast length",
    "an index without a weight", "an index of the wrong file",
}  # fmt: skip
"""Attacks whose folder may be loaded: the model is what its weights say, and no code was run."""


def attacked(saved: list[Path], folder: Path, names: list[str]) -> Iterator[tuple[str, Path]]:
    """A copy of a folder with each of the attacks: (name, folder)."""
    for index, name in enumerate(names):
        target = Path(shutil.copytree(saved[name in SEVERAL], folder / str(index)))
        CASES[name](target)
        yield name, target
        shutil.rmtree(target)


def loader(warm: list[str]) -> Callable[[str], None]:
    """Opens folders as the command line does; AssertionError if weights are not those of the files, or code was run."""
    from bmgraph.cli.model_source import open_source

    def load(path: str) -> None:
        source = open_source(path)
        marks = [Path("/tmp") / MARK, Path(path) / MARK]
        assert not any(mark.exists() for mark in marks), "code of the folder was run"
        _check(Path(path), source.model)

    for path in warm:
        load(path)
    return load


def _check(folder: Path, model: torch.nn.Module) -> None:
    from safetensors.torch import load_file

    files = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else sorted(folder.glob("model-*.safetensors"))
    stored = {name: value for file in files for name, value in load_file(file).items()}
    for name, value in model.state_dict().items():
        expected = stored[name].to(value.dtype)
        assert torch.equal(value.nan_to_num(), expected.nan_to_num()), f"{name} is not what the file holds"
