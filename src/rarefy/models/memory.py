"""Give memory that was freed back to the operating system."""

import ctypes
import functools
from collections.abc import Callable


def release_freed_memory() -> None:
    """Return the free pages of the C heap, where the C library can do it (glibc).

    A walk through a model frees megabytes between small results that stay; the heap then grows with every block,
    although little of it is in use.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        library = ctypes.CDLL(None)
        found: Callable[[int], int] = library.malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return found
