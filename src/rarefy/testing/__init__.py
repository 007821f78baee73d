"""Conformance suites for authors of layouts and methods: what rarefy's own entries must pass, anyone's can.

Each suite is loaded at first use, so that checking a layout does not import torch.
"""

from importlib import import_module

_PUBLIC = {"check_layout": "rarefy.testing.layout", "check_method": "rarefy.testing.method"}

__all__ = ["check_layout", "check_method"]


def __getattr__(name: str) -> object:
    """Load a suite at first use."""
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'rarefy.testing' has no attribute {name!r}")
    return getattr(import_module(module), name)
