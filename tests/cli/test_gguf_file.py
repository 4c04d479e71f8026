"""A `.gguf` file is read whole and bounded, or refused in one line that names it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from bmgraph.cli.gguf_file import read_header
from bmgraph.cli.model_source import open_source
from bmgraph.errors import InputError

gguf = pytest.importorskip("gguf")
WIDTH, WORDS = 8, 12


def written(file: Path, without: str = "", **numbers: int) -> Path:
    """A Llama of one layer with a tokenizer of 12 pieces; `numbers` replace those of its metadata."""
    known = {
        "context_length": 32, "embedding_length": WIDTH, "block_count": 1, "feed_forward_length": 16,
        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 4, "vocab_size": WORDS,
    }  # fmt: skip
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    for name, number in {
        **known,
        **{key.replace("__", "."): value for key, value in numbers.items()},
    }.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "c", "d", "e", "\u2581a", "\u2581b", "ab"]
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(place) for place in range(WORDS)])
    writer.add_token_types([2, 3, 3, *[1] * (WORDS - 3)])
    for name, number in (("bos", 1), ("eos", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    square, norm = (WIDTH, WIDTH), (WIDTH,)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WORDS, WIDTH), "output_norm.weight": norm, "output.weight": (WORDS, WIDTH),
        "blk.0.attn_norm.weight": norm, "blk.0.ffn_norm.weight": norm,
        **{f"blk.0.attn_{part}.weight": square for part in ("q", "k", "v", "output")},
        "blk.0.ffn_up.weight": (16, WIDTH), "blk.0.ffn_gate.weight": (16, WIDTH), "blk.0.ffn_down.weight": (WIDTH, 16),
    }  # fmt: skip
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_whole_file_is_a_model_and_its_tokenizer(tmp_path: Path) -> None:
    source = open_source(str(written(tmp_path / "tiny.gguf")), 8)
    assert type(source.model).__name__ == "LlamaForCausalLM"
    assert source.tokenizer is not None
    assert read_header(tmp_path / "tiny.gguf").shapes["blk.0.ffn_up.weight"] == (WIDTH, 16)


def test_a_weight_that_it_lacks_is_not_invented(tmp_path: Path) -> None:
    file = written(tmp_path / "tiny.gguf", without="blk.0.attn_q.weight")
    with pytest.raises(
        InputError, match=r"tiny.gguf holds no weights for model.layers.0.self_attn.q_proj.weight"
    ):
        open_source(str(file), 8)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            {"block_count": 2**31},
            "says llama.block_count=2147483648, but the file holds no weights for as many",
        ),
        (
            {"feed_forward_length": 2**30},
            "describes a model that is larger than the weights that the file holds",
        ),
        ({"vocab_size": 2**30}, "describes a model that is larger than the weights that the file holds"),
    ],
)
def test_a_description_beyond_its_weights_is_refused(
    tmp_path: Path, numbers: dict[str, int], said: str
) -> None:
    with pytest.raises(InputError, match=f"the metadata of .*tiny.gguf {said}: take the file anew"):
        open_source(str(written(tmp_path / "tiny.gguf", **numbers)), 8)


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HEAD = b"GGUF" + struct.pack("<I", 3)


def _header(tensors: int = 0, fields: int = 1, field: bytes = b"", rest: bytes = b"") -> bytes:
    return HEAD + struct.pack("<QQ", tensors, fields) + field + rest + bytes(64)


def _tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(b"w") + sizes + struct.pack("<IQ", kind, offset)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read as a .gguf file"),
    "another format": (b"PK\x03\x04" + bytes(64), "does not begin with GGUF"),
    "an old version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1"),
    "truncated": (HEAD, "goes on behind the end"),
    "2^60 tensors": (_header(tensors=2**60), "claims 1152921504606846976 tensors"),
    "2^60 fields": (_header(fields=2**60), "claims 1152921504606846976 fields"),
    "a long name": (_header(field=struct.pack("<Q", 2**62)), "goes on behind the end"),
    "a list of 2^50": (_header(field=_text(b"l") + struct.pack("<IIQ", 9, 0, 2**50)), "values in lists"),
    "a list behind the end": (_header(field=_text(b"l") + struct.pack("<IIQ", 9, 0, 10**6)), "goes on behind the end"),
    "a list of lists": (_header(field=_text(b"l") + struct.pack("<IIQ", 9, 9, 2)), "a list of the type 9"),
    "an unknown type": (_header(field=_text(b"l") + struct.pack("<I", 77)), "unknown type 77"),
    "a lying shape": (_header(1, 0, rest=_tensor(2**20, 2**20)), r"'w' of shape \[1048576, 1048576\] does not fit"),
    "an offset behind the end": (_header(1, 0, rest=_tensor(2, offset=2**40)), "does not fit in the file"),
    "2^31 dimensions": (_header(1, 0, rest=_text(b"w") + struct.pack("<I", 2**31)), "dimensions of tensor 'w'"),
    "an unknown type of tensor": (_header(1, 0, rest=_tensor(2, kind=999)), "999"),
    "twice the same": (_header(2, 0, rest=_tensor(1) + _tensor(1)), "two tensors of one name"),
    "no alignment": (
        _header(field=_text(b"general.alignment") + struct.pack("<II", 4, 0)), "its alignment is 0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_at_once(tmp_path: Path, name: str) -> None:
    data, said = HOSTILE[name]
    file = tmp_path / "bad.gguf"
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"bad.gguf cannot be read as a .gguf file: .*{said}|{said}"):
        open_source(str(file), 8)


def test_what_its_readers_raise_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "none.gguf"
    file.write_bytes(_header(fields=0))
    with pytest.raises(InputError, match=r"none.gguf cannot be read") as caught:
        open_source(str(file), 8)
    assert len(str(caught.value).splitlines()) == 1
