"""Jobs on torch's own threads.

Torch's threads look for work for milliseconds after an operation of theirs. What runs between two of those, as a
convolution between a normalization and an activation does, would wait for the processors that they hold.
"""

import ctypes
import functools
import os

import torch

from rarefy.kernels.extension import native


@functools.cache
def share_threads() -> bool:
    """Lend the kernels the threads of torch's OpenMP, where it has any that look for work; once for all.

    Returns:
        Whether it has, and they are lent.
    """
    module = native()
    if module is None or os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive":
        return False
    addresses = []
    for name in ("GOMP_parallel", "omp_get_max_threads"):
        try:
            # In the libraries that torch is linked with, whatever their names.
            function = ctypes.CDLL(torch._C.__file__)[name]
        except (AttributeError, OSError):
            return False
        addresses.append(ctypes.cast(function, ctypes.c_void_p).value or 0)
    module.lend_team(*addresses)
    return True
