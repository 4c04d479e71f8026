"""The files that an ONNX Runtime engine was made of: opened once, and read, saved and run from what was opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bmgraph.errors import BundleError
from bmgraph.runtime.ort.session import ModelInMemory, make_session
from bmgraph.serialize.opened import OpenedFile, open_regular_file

if TYPE_CHECKING:
    from onnxruntime import InferenceSession


def weights_file(model: str) -> str:
    """The file beside a model that holds its large weights."""
    return f"{model}.data"


class ModelFiles:
    """The files of one model by their names, and the folder that they were opened in.

    The files of a bundle (`checked`) are read into memory before ONNX Runtime sees them, since it maps the weights of a
    file: whoever cut or overwrote the file would end the process or change the model. Those that we wrote into a private
    folder ourselves are mapped: ONNX Runtime lets go of each weight once a kernel has packed it, where it would keep what it was
    given in memory, and a copy. So large files of a bundle are copied to such a folder (`mapped_in`). Saving copies what was opened, so
    it does not matter if the folder has gone or holds something else by then; a file that was overwritten in place is refused.
    """

    def __init__(self, folder: Path, model: str, opened: Mapping[str, OpenedFile], checked: bool) -> None:
        self.folder, self.model, self._checked = folder, model, checked
        names = (model, weights_file(model))
        self.opened = {name: opened[name] for name in names if name in opened}

    @staticmethod
    def in_private_folder(folder: Path, model: str) -> ModelFiles:
        """The files of a model that was just written to a folder that only this process uses."""
        names = [name for name in (model, weights_file(model)) if (folder / name).exists()]
        opened = {name: open_regular_file(folder / name) for name in names}
        return ModelFiles(folder, model, opened, checked=False)

    def mapped_in(self, folder: Path | None) -> ModelFiles:
        """The same files, copied to a folder that only this process uses; these themselves for None and where there is no room.

        Raises BundleError if a file is not what was checked.
        """
        if folder is None:
            return self
        try:
            for name, file in self.opened.items():
                file.copy_to(folder / name)
        except OSError:  # no room: they fit into memory, perhaps
            for name in self.opened:
                (folder / name).unlink(missing_ok=True)
            return self
        return ModelFiles.in_private_folder(folder, self.model)

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(file.status.st_size for file in self.opened.values())

    def read(self, weights: bool = True) -> ModelInMemory:
        """The model, and unless told otherwise its weights, in memory; raises BundleError if a file is not what was checked."""
        for file in self.opened.values():
            file.check_unwritten()
        data = {name: file.read() for name, file in self.opened.items() if weights or name == self.model}
        return ModelInMemory(self.folder / self.model, bytes(data.pop(self.model)), data)

    @property
    def held(self) -> tuple[str, int] | None:
        """The name and size of the file that holds the model's large weights; None where it has none."""
        name = weights_file(self.model)
        return (name, self.opened[name].status.st_size) if name in self.opened else None

    @property
    def are_mapped(self) -> bool:
        """Whether ONNX Runtime maps these files."""
        return not self._checked

    def session(
        self,
        providers: Sequence[str] | None,
        threads: int | None,
        profile: str = "",
        read: ModelInMemory | None = None,
    ) -> InferenceSession:
        """A session, as `make_session` makes it, on the model that was `read`; it is read now where None is given."""
        if self._checked:
            return make_session(read or self.read(), providers, threads, profile)
        return make_session(self.folder / self.model, providers, threads, profile)

    def copied_to(self, folder: Path, read: ModelInMemory) -> ModelFiles:
        """What was `read` of these files, written to a folder that only this process uses."""
        held: dict[str, bytes | bytearray] = {self.model: read.data, **read.weights}
        for name, data in held.items():
            (folder / name).write_bytes(data)
        return ModelFiles.in_private_folder(folder, self.model)

    def copy(self, name: str, file: Path) -> None:
        """Write one of the files to `file`; raises BundleError if it was altered since it was opened."""
        if name not in self.opened:
            raise BundleError(f"the engine has no file {name!r}")
        self.opened[name].copy_to(file)
        self.opened[name].check_unwritten()
