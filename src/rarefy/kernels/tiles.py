"""AMX proves itself before it is used: its kernels have passed their tests in an emulation only (ADR 0015).

Shape suffixes: T rows of activations, O out, I in.
"""

from types import ModuleType
from typing import Final

import numpy as np

from rarefy.core.grids import Float32Array, to_bf16_bits

_OUTPUTS: Final = 40
_INPUTS: Final = 200


def tiles_agree(module: ModuleType) -> bool:
    """Whether the products through tiles are those of AVX-512: the same bits of codes, the same rounding of bfloat16.

    Args:
        module: the extension, on a CPU with AMX.
    """
    random = np.random.default_rng(0)
    x_TI = random.standard_normal((24, _INPUTS), np.float32)
    codes_OI = random.integers(0, 256, (_OUTPUTS, _INPUTS), np.uint8)
    scales_O1 = to_bf16_bits(random.uniform(0.01, 0.02, (_OUTPUTS, 1)).astype(np.float32))
    values_OI = to_bf16_bits(random.standard_normal((_OUTPUTS, _INPUTS), np.float32))

    def product(isa: str, format: str, **arrays: object) -> Float32Array:
        integers = {"symmetric": 1} if format == "dense-int8-v1" else {}
        weights = module.prepare(format, isa, _OUTPUTS, _INPUTS, integers, arrays)
        y_TO = np.empty((len(x_TI), _OUTPUTS), np.float32)
        module.matmul(x_TI, [weights], [y_TO])
        return y_TO

    int8, int8_tiles = (product(isa, "dense-int8-v1", codes=codes_OI, scales=scales_O1) for isa in ("avx512", "amx"))
    bf16, bf16_tiles = (product(isa, "dense-bf16-v1", values=values_OI) for isa in ("avx512", "amx"))
    # Sums of 200 products of unit size: float32 rounds them by some 1e-5, other activations change them by 1e-2.
    return np.array_equal(int8, int8_tiles) and bool(np.abs(bf16 - bf16_tiles).max() < 1e-3)
