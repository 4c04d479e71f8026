"""What a model's own generation config says: the ids that texts start, end and are padded with, and how long they get."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CHANGES_NOTHING: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False), "num_beams": (None, 1), "num_beam_groups": (None, 1), "min_length": (None, 0),
    "min_new_tokens": (None, 0), "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "forced_decoder_ids": (None,), "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []), "bad_words_ids": (None,), "sequence_bias": (None,),
    "guidance_scale": (None, 1, 1.0), "penalty_alpha": (None, 0.0), "stop_strings": (None,),
}  # fmt: skip
"""Setting of a model's config that changes which ids are chosen, and that engines do not serve by themselves -> values that change nothing."""


@dataclass(frozen=True)
class GenerationDefaults:
    """The values that `generate` takes where a caller gives none.

    start: the id that a decoder with an encoder starts with. eos: the ids that end a text. pad: the id in the place of
    padding. max_new_tokens, or max_length, which counts the prompt (of a decoder with an encoder: its start id) too.
    unserved: what the config asks for and engines do not do, such as beams; told in the report.
    """

    start: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    unserved: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The values as JSON."""
        return {**asdict(self), "eos": list(self.eos), "unserved": list(self.unserved)}

    @classmethod
    def from_json(cls, data: object) -> GenerationDefaults:
        """The inverse of `as_json`; raises ValueError for anything else."""
        if not isinstance(data, dict) or not set(data) <= set(cls.__dataclass_fields__):
            raise ValueError(f"the generation defaults are {data!r}: expected an object of their fields")
        numbers = {name: data.get(name) for name in ("start", "pad", "max_new_tokens", "max_length")}
        eos, unserved = data.get("eos", []), data.get("unserved", [])
        if not isinstance(eos, list) or not all(map(_is_count, eos)):
            raise ValueError(f"the ids that end a text are {eos!r}: expected whole numbers")
        if not isinstance(unserved, list) or not all(isinstance(item, str) for item in unserved):
            raise ValueError(f"unserved settings of generation are {unserved!r}: expected texts")
        for name, value in numbers.items():
            if value is not None and not _is_count(value):
                raise ValueError(f"{name} of generation is {value!r}: expected a whole number or nothing")
        return cls(eos=tuple(eos), unserved=tuple(unserved), **numbers)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
