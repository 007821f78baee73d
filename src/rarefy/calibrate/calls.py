"""The arguments of a model's calls, and the mode in which calibration calls it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

# Where a value lies in nested containers: keys and indices.
Place = tuple[str | int, ...]


@final
@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> dict[Place, Any]:
        """Every value in the arguments that is no container, by its path."""
        return dict(leaves((self.args, self.kwargs)))


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and none of torch's fused shortcuts that bypass the layers they are made of."""
    training = model.training
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        model.train(training)


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value in nested tuples, lists and dicts that is none of these, with its path."""
    if isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def substitute(value: Any, substitutes: Mapping[Place, Any], path: Place = ()) -> Any:
    """The same nested containers with other values at some paths."""
    if path in substitutes:
        return substitutes[path]
    if isinstance(value, tuple | list):
        items = [substitute(item, substitutes, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        new = copy.copy(value)  # of its own class: transformers' outputs have their entries as attributes too
        for key, item in value.items():
            new[key] = substitute(item, substitutes, (*path, key))
        return new
    return value


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are known to be equal."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, str | int | float | bool | torch.dtype | torch.device) and type(a) is type(b):
        return bool(a == b)
    return False
