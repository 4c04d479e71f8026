"""The models that clients name: an engine, and each delta that its rows choose among."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmgraph.errors import BmgraphError, InputError
from bmgraph.runtime.generation.generate import GeneratingEngine
from bmgraph.runtime.generation.tokenizer import Tokenizer
from bmgraph.serving.api_error import ApiError, refused
from bmgraph.utils.did_you_mean import did_you_mean


class ServedModels:
    """An engine under a name, and its deltas under theirs. Deltas may come and go while it runs."""

    def __init__(self, engine: GeneratingEngine, name: str, deltas_from: str | None = None) -> None:
        """Raises InputError for an engine without a tokenizer."""
        if engine.tokenizer is None:
            raise InputError(
                f"the engine {name!r} has no tokenizer, so it serves no texts: compile it with resources={{'tokenizer': ...}}"
            )
        self.engine, self.name = engine, name
        self.tokenizer: Tokenizer = engine.tokenizer
        self._created = int(time.time())
        self._deltas_from = None if deltas_from is None else Path(deltas_from).resolve()

    @property
    def names(self) -> Sequence[str]:
        """What clients may ask for: the engine, then its deltas."""
        return [self.name, *(self.engine.live or ())]

    @property
    def generates(self) -> bool:
        """Whether it continues texts; else it gives embeddings."""
        return self.engine.decoder() is not None

    def choice(self, model: str) -> dict[str, Any]:
        """The options of `submit` by which a model is chosen. Raises ApiError (404) for an unknown one."""
        if model == self.name:
            return {}
        live = self.engine.live
        if live is None or model not in live:
            known = self.names
            raise ApiError(
                404, f"the model {model[:80]!r} does not exist{did_you_mean(model, known)} (there are {', '.join(known)})",
                param="model", code="model_not_found",
            )  # fmt: skip
        return {live.form.input: model}

    def card(self, model: str) -> dict[str, object]:
        """What the API says of a model."""
        self.choice(model)
        found = {"id": model, "object": "model", "created": self._created, "owned_by": "bmgraph"}
        return found if model == self.name else {**found, "root": self.name}

    def add(self, model: str, folder: str) -> dict[str, object]:
        """Let a delta be asked for, from a folder below that which clients may name. Raises ApiError."""
        if self._deltas_from is None:
            raise ApiError(
                403, "this server takes no deltas from clients: start it with --deltas-from FOLDER"
            )
        path = (self._deltas_from / folder).resolve()
        if self._deltas_from not in path.parents:
            raise ApiError(403, "the folder lies outside of that of deltas: name one in it", param="folder")
        if model == self.name:
            raise refused(f"the engine itself is called {model!r}: choose another name", "id")
        try:
            self.engine.deltas.add(model, path)
        except InputError:
            raise
        except BmgraphError as error:
            raise refused(
                str(error).replace(str(self._deltas_from), ""), "folder", "invalid_delta"
            ) from error
        return self.card(model)

    def remove(self, model: str) -> dict[str, object]:
        """Let a delta go. Raises ApiError."""
        if self._deltas_from is None:
            raise ApiError(
                403, "this server removes no models for clients: start it with --deltas-from FOLDER"
            )
        self.choice(model)
        if model == self.name:
            raise refused(f"{model!r} is the engine itself, which stays", "model")
        self.engine.deltas.remove(model)
        return {"id": model, "object": "model", "deleted": True}
