"""Reads tensors of a checkpoint, whole, from the files that hold their pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bmgraph.errors import BundleError
from bmgraph.runtime.training.checkpoint_layout import SPANS, STATE_FILE
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.safetensors_io import TensorsOfFile, open_tensors


@dataclass(frozen=True)
class StoredPiece:
    """Elements [begin, end) of a flat tensor in one file; `end` is None for a tensor that is there as a whole."""

    file: TensorsOfFile
    begin: int = 0
    end: int | None = None


class StateReader:
    """The tensors of a checkpoint by key, such as "value/up.weight"."""

    def __init__(self, bundle: Bundle, pieces: Mapping[str, list[StoredPiece]]) -> None:
        self._bundle, self._pieces = bundle, pieces

    @property
    def names(self) -> set[str]:
        """The keys of all of them."""
        return set(self._pieces)

    def read(self, name: str, shape: torch.Size) -> torch.Tensor:
        """One tensor; `shape` is that of one which is stored in pieces, and so flat.

        Raises BundleError if it is missing, or its pieces are not its elements, each once.
        """
        pieces = sorted(self._pieces.get(name, []), key=lambda piece: piece.begin)
        if not pieces:
            raise BundleError(f"{self._bundle.path} has no tensor {name!r}")
        if pieces[0].end is None and len(pieces) == 1:
            return pieces[0].file.read(name)
        size, next_begin = shape.numel(), 0
        whole: torch.Tensor | None = None
        for piece in pieces:
            if piece.end is None or piece.begin != next_begin or not piece.begin < piece.end <= size:
                raise self._torn(name)
            found = piece.file.read(name)
            if found.shape != (piece.end - piece.begin,) or (
                whole is not None and found.dtype != whole.dtype
            ):
                raise self._torn(name)
            if whole is None:
                whole = torch.empty(size, dtype=found.dtype)
            whole[piece.begin : piece.end] = found
            next_begin = piece.end
        if whole is None or next_begin != size:
            raise self._torn(name)
        return whole.view(shape)

    def _torn(self, name: str) -> BundleError:
        return BundleError(
            f"{self._bundle.path} holds pieces of {name!r} that do not make this program's: it was saved from another program, "
            "or altered"
        )


@contextmanager
def open_state(bundle: Bundle) -> Iterator[StateReader]:
    """The tensors of a checkpoint, to be read one at a time; raises BundleError for files that are not valid."""
    spans = bundle.manifest.get(SPANS, {STATE_FILE: {}})
    if not isinstance(spans, dict) or not all(isinstance(item, dict) for item in spans.values()):
        raise BundleError(f"the manifest of {bundle.path} does not say which elements its files hold")
    pieces: dict[str, list[StoredPiece]] = {}
    with ExitStack() as stack:
        for file, of_file in spans.items():
            opened = stack.enter_context(open_tensors(bundle.open(file)))
            unknown = sorted(of_file.keys() - set(opened.names))
            if unknown:
                raise BundleError(f"{bundle.path} says that {file} holds {unknown[0]!r}, which it does not")
            for name in opened.names:
                begin, end = _span(bundle, name, of_file[name]) if name in of_file else (0, None)
                pieces.setdefault(name, []).append(StoredPiece(opened, begin, end))
        yield StateReader(bundle, pieces)


def _span(bundle: Bundle, name: str, found: Any) -> tuple[int, int]:
    if isinstance(found, list) and len(found) == 2 and all(type(item) is int for item in found):
        return found[0], found[1]
    raise BundleError(f"the manifest of {bundle.path} holds no valid span of {name!r}: {found!r}")
