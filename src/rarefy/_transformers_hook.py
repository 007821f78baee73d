"""Make `import rarefy` enough for transformers to load rarefy artifacts, without importing torch or transformers.

transformers learns of a quantization method by a call of its registration functions, which needs transformers and torch
to be imported. So the call waits until transformers itself imports the module that holds them.
"""

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register rarefy with transformers now if its quantizers are imported, else as soon as they are."""
    if hasattr(sys.modules.get(TARGET), "register_quantizer"):
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import_module("rarefy.nn.transformers_quantizer")  # registers itself
    except Exception as error:
        # transformers must stay usable for other models if its interfaces have moved.
        warnings.warn(f"rarefy could not register with transformers: {error!r}", RuntimeWarning, stacklevel=2)


class _Finder(MetaPathFinder):
    """Lets the other finders find `transformers.quantizers.auto` and wraps the loader they return."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the target with the other finders; leave every other module alone."""
        if fullname != TARGET:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """The real loader, followed by the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the real loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then register."""
        # From here on nobody needs the wrapper; inspect and pkgutil see the real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        _register()
