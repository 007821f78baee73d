"""Sums of x^T x over bfloat16 activations, for calibration. Shape suffixes: T tokens, I features."""

import numpy as np
import numpy.typing as npt

from rarefy.kernels.extension import extension_status, isa_cap, native


def has_gram_kernel() -> bool:
    """Whether `add_gram` can run: compiled kernels, a CPU with AVX512_BF16, and RAREFY_ISA not below avx512.

    Raises:
        UsageError: RAREFY_ISA names no instruction set.
    """
    if isa_cap() not in (None, "avx512", "avx512_bf16", "amx") or not extension_status()[0]:
        return False
    module = native()
    return module is not None and bool(module.gram_available())


def add_gram(bits_TI: npt.NDArray[np.uint16], total_II: npt.NDArray[np.float32]) -> None:
    """Add x^T x to the upper triangle of `total_II`, in place; entries below the diagonal are of no meaning afterwards.

    Args:
        bits_TI: bfloat16 bits, uint16 (T, I), C-contiguous.
        total_II: float32 (I, I), C-contiguous.

    Notes:
        Only where `has_gram_kernel()`. Products are exact and sums are in float32, in the order of the tokens within a
        pass of 256; the result does not depend on the number of threads. Subnormal inputs count as zero.
    """
    module = native()
    assert module is not None
    module.add_gram(bits_TI, total_II)
