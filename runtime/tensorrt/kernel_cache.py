"""TensorRT for RTX compiles kernels at calls: they are kept for the next process."""

from __future__ import annotations

from typing import Any

from bmgraph.runtime.tensorrt.cache_file import CacheFile


class KernelCache:
    """The kernels of one loaded plan, in a file. They are written behind the calls 1, 2, 4, 8, ..., where there are new ones: sizes that
    were not called before have kernels of their own."""

    def __init__(self, file: CacheFile) -> None:
        self.file = file
        self._calls = 0
        self._cache: Any = None

    def context(self, engine: Any) -> Any:
        """An execution context of a loaded plan (`ICudaEngine`) that begins with what the file holds, and adds to it."""
        config = engine.create_runtime_config()
        self._cache = config.create_runtime_cache()
        held = self.file.read()
        if held and not self._cache.deserialize(held):
            self.file.ignore("TensorRT refuses it; another GPU, driver or version may have made it")
        config.set_runtime_cache(self._cache)
        return engine.create_execution_context(config)

    def called(self) -> None:
        """A call has ended."""
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            self.file.write(bytes(self._cache.serialize()))
