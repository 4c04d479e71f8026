"""Weights that a bundle refers to instead of holding them: files of tensors elsewhere, with the digest of each tensor."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bmgraph.errors import BundleError, InputError
from bmgraph.serialize.bundle import Bundle
from bmgraph.serialize.opened import OpenedFile, open_user_file
from bmgraph.serialize.safetensors_io import LARGEST_HEADER
from bmgraph.serialize.stored_file import FileTensor, stored_tensors
from bmgraph.utils.digest import content_digest
from bmgraph.utils.memory_budget import memory_budget
from bmgraph.utils.progress import track
from bmgraph.utils.stored_tensor import StoredTensor, source_of

REFERENCES = "references"
SUFFIX = ".safetensors"
_ADVICE = "put the file back as it was, or save the program again where its weights are, with weights='copy'"


def referred_tensors(tensors: Mapping[str, torch.Tensor], destination: Path) -> dict[str, FileTensor]:
    """Those of the tensors that are still the ones of a file outside of `destination`, which is about to be replaced.

    Their digests are computed where they are not known yet, a block at a time. Raises InputError if there is none,
    BundleError where a file was moved or changed since it was opened, or holds values that are not finite.
    """
    found: dict[str, FileTensor] = {}
    for name, tensor in tensors.items():
        source = _unchanged(tensor)
        if source is not None and not source.path.is_relative_to(destination.absolute()):
            found[name] = source
    if not found:
        raise InputError(
            "weights='reference': no tensor of this program is in a file outside of the bundle: save it with weights='copy'"
        )
    for file in {source.file: source for source in found.values()}.values():
        _check_in_place(file)
    for name, source in track(found.items(), "digests of weights"):
        if not source.digest or source.finite is False:
            raise BundleError(f"parameter {name!r} in {source.path} holds NaN or infinity")
    return found


def _unchanged(tensor: torch.Tensor) -> FileTensor | None:
    """The place of a tensor in a file, where its values are still those of the file."""
    if not isinstance(tensor, StoredTensor) or not isinstance(tensor.source, FileTensor):
        return None
    if source_of(tensor) is None and content_digest(tensor) != tensor.source.digest:
        return None
    return tensor.source


def _check_in_place(source: FileTensor) -> None:
    try:
        same = os.path.samestat(os.stat(source.path), source.file.status)
    except OSError:
        same = False
    if not same:
        raise BundleError(
            f"weights='reference': {source.path} was moved or replaced since its weights were opened: load them again, or "
            "save with weights='copy'"
        )
    source.file.check_unwritten()


def describe(referred: Mapping[str, FileTensor]) -> dict[str, Any]:
    """What a manifest says of the tensors that it refers to."""
    files = list({source.path: source for source in referred.values()}.values())
    index = {source.path: number for number, source in enumerate(files)}
    return {
        "files": [
            {"path": str(item.path), "size": item.file.status.st_size, "header": _header_digest(item.file)}
            for item in files
        ],
        "tensors": {
            name: [index[source.path], source.name, source.digest] for name, source in referred.items()
        },
    }


def open_references(bundle: Bundle) -> dict[str, torch.Tensor]:
    """The tensors that a bundle refers to, by name; none is read.

    Every file is opened once, and its size and header are compared now; the bytes of a tensor are compared with its
    digest whenever it is read. Raises BundleError where a file is missing, was changed, or is not a file of tensors.
    """
    told = bundle.manifest.get(REFERENCES)
    if told is None:
        return {}
    try:
        files = [(Path(item["path"]), int(item["size"]), str(item["header"])) for item in told["files"]]
        wanted = [
            (str(name), int(item[0]), str(item[1]), str(item[2])) for name, item in told["tensors"].items()
        ]
        by_file: list[dict[str, str]] = [{} for _ in files]
        for _, number, inner, digest in wanted:
            by_file[range(len(files))[number]][inner] = digest
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BundleError(f"bundle {bundle.path} does not say validly which files it refers to") from error
    resident = sum(size for _, size, _ in files) <= memory_budget()
    opened = [
        stored_tensors(_open(bundle, *file), file[0], resident, digests)
        for file, digests in zip(files, by_file, strict=True)
    ]
    found: dict[str, torch.Tensor] = {}
    for name, number, inner, digest in wanted:
        if inner not in opened[number] or len(digest) != 64:
            raise BundleError(
                f"bundle {bundle.path} refers to {inner!r} in {files[number][0]}, which has no such tensor"
            )
        found[name] = opened[number][inner]
    return found


def _open(bundle: Bundle, path: Path, size: int, header: str) -> OpenedFile:
    if not path.is_absolute() or ".." in path.parts or path.suffix != SUFFIX:
        raise BundleError(
            f"bundle {bundle.path} refers to {str(path)!r}, which is not the whole path of a {SUFFIX} file"
        )
    try:
        file = open_user_file(path, "folder")
    except BundleError as error:
        raise BundleError(
            f"bundle {bundle.path} refers to weights in {path}, which cannot be opened: {_ADVICE}"
        ) from error
    if file.status.st_size != size or _header_digest(file) != header:
        raise BundleError(
            f"bundle {bundle.path} refers to weights in {path}, which was changed since it was saved: {_ADVICE}"
        )
    return file


def _header_digest(file: OpenedFile) -> str:
    """sha256 of the part of a file of tensors that says where each of them is."""
    prefix = bytearray(8)
    size = file.status.st_size
    if size < 8:
        return ""
    file.part(0, memoryview(prefix))
    text = bytearray(min(struct.unpack("<Q", prefix)[0], size - 8, LARGEST_HEADER))
    file.part(8, memoryview(text))
    return hashlib.sha256(prefix + text).hexdigest()
