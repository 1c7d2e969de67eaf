"""Open-Qwen2VL in transformers' Auto classes, without importing transformers before somebody else does.

A finder on `sys.meta_path` watches transformers: once one of its modules with Auto classes has been imported, our
classes are registered there. Those modules are often imported in the middle of others that our own classes need, so
that this waits until the outermost import of a module of transformers, or of this package, is over.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType

_PACKAGES = ("transformers.", "open_qwen2vl.")


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .modeling.configuration_open_qwen2vl import OpenQwen2VLConfig

    AutoConfig.register("open_qwen2vl", OpenQwen2VLConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto.modeling_auto import (
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
    )

    from .modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
    from .modeling.modeling_open_qwen2vl import OpenQwen2VLForConditionalGeneration, OpenQwen2VLModel

    AutoModel.register(OpenQwen2VLConfig, OpenQwen2VLModel, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(OpenQwen2VLConfig, OpenQwen2VLForConditionalGeneration, exist_ok=True)


def _register_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from .modeling.configuration_open_qwen2vl import OpenQwen2VLConfig
    from .processing.processing_open_qwen2vl import OpenQwen2VLProcessor

    AutoProcessor.register(OpenQwen2VLConfig, OpenQwen2VLProcessor, exist_ok=True)


class _Finder:
    """Finds modules of `_PACKAGES` as the other finders do, and hears when they have been imported."""

    def __init__(self, waiting: dict[str, Callable[[], None]]):
        self._waiting = waiting
        self._thread = _Thread()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_PACKAGES) or name in self._thread.looked_for:
            return None
        self._thread.looked_for.add(name)  # another finder may ask all finders too, this one among them
        try:
            specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self._thread.looked_for.remove(name)
        if spec is not None and type(spec.loader) is SourceFileLoader:  # others, as pytest's, are left alone
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self._importing)
        return spec

    @contextmanager
    def _importing(self) -> Iterator[None]:
        self._thread.depth += 1
        try:
            yield
        finally:
            self._thread.depth -= 1
        if not self._thread.depth:
            self.register()

    def register(self) -> None:
        """Register in all modules that are there by now."""
        self._thread.depth += 1  # what is imported here does not register once more
        try:
            for name in [name for name in self._waiting if name in sys.modules]:
                self._waiting[name]()  # twice, if two threads import at the same time: that changes nothing
                self._waiting.pop(name, None)
        finally:
            self._thread.depth -= 1
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)


class _Thread(threading.local):
    """What a thread is importing: how many modules within one another, and which are looked for."""

    def __init__(self):
        self.depth = 0
        self.looked_for: set[str] = set()


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, importing: Callable[[], AbstractContextManager[None]]):
        super().__init__(name, path)
        self._importing = importing

    def exec_module(self, module: ModuleType) -> None:
        with self._importing():
            super().exec_module(module)


def register_when_imported() -> None:
    """Register with the Auto classes: with those that are imported now, and with the others when they are."""
    auto = "transformers.models.auto."
    finder = _Finder(
        {
            f"{auto}configuration_auto": _register_config,
            f"{auto}modeling_auto": _register_models,
            f"{auto}processing_auto": _register_processor,
        }
    )
    sys.meta_path.insert(0, finder)
    finder.register()
