"""Make neural networks sparse, small and measurably faster on the CPUs people have.

Importing this package is cheap: every public name is loaded at first use, and `import rarefy` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from rarefy import _transformers_hook

if TYPE_CHECKING:  # type checkers and editors see the names that __getattr__ loads
    from rarefy.artifact import Artifact, read_artifact, write_artifact
    from rarefy.core.errors import RarefyError
    from rarefy.engine import Engine
    from rarefy.kernels import matmul, prepare
    from rarefy.layouts import pack, unpack
    from rarefy.nn import load_into
    from rarefy.recipe import load_recipe
    from rarefy.run import compress

__version__ = "0.1.0"

_PUBLIC = {
    "Artifact": "rarefy.artifact",
    "Engine": "rarefy.engine",
    "RarefyError": "rarefy.core.errors",
    "compress": "rarefy.run",
    "load_into": "rarefy.nn",
    "load_recipe": "rarefy.recipe",
    "matmul": "rarefy.kernels",
    "pack": "rarefy.layouts",
    "prepare": "rarefy.kernels",
    "read_artifact": "rarefy.artifact",
    "unpack": "rarefy.layouts",
    "write_artifact": "rarefy.artifact",
}

__all__ = [
    "Artifact",
    "Engine",
    "RarefyError",
    "__version__",
    "compress",
    "load_into",
    "load_recipe",
    "matmul",
    "pack",
    "prepare",
    "read_artifact",
    "unpack",
    "write_artifact",
]


def __getattr__(name: str) -> object:
    """Load a public name from its module at first use."""
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}")
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


_transformers_hook.install()
