"""Memory that a thread keeps from call to call: the first touch of new one can take longer than the work on it."""

import threading
from math import prod
from typing import Final

import numpy as np
import numpy.typing as npt

KEPT_BYTES: Final = 32 << 20
"""Most that is kept under one name; more is given back after each call."""


class _Kept(threading.local):
    def __init__(self) -> None:
        self.arrays: dict[str, npt.NDArray[np.float32]] = {}


_KEPT = _Kept()


def scratch(name: str, *shape: int) -> npt.NDArray[np.float32]:
    """An array with any numbers in it, valid until this thread asks for one of the same name again."""
    size = prod(shape)
    if 4 * size > KEPT_BYTES:
        return np.empty(shape, np.float32)
    kept = _KEPT.arrays.get(name)
    if kept is None or kept.size < size:
        kept = _KEPT.arrays[name] = np.empty(size, np.float32)
    return kept[:size].reshape(shape)
