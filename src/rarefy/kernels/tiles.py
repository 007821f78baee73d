"""AMX proves itself before it is used: its kernels have passed their tests in an emulation only (ADR 0015).

Shape suffixes: T rows of activations, O out, I in.
"""

from types import ModuleType
from typing import Final

import numpy as np

from rarefy.core.grids import to_bf16_bits

_ROWS: Final = 40
_OUTPUTS: Final = 40
_INPUTS: Final = 1100  # two stretches of blocks and a part of one, which ends in half a cell

_BLOCK: Final = {"block_shape_0": 48, "block_shape_1": 1120}
"""One block that is the whole weight."""


def tiles_agree(module: ModuleType) -> bool:
    """Whether the products through tiles are those of AVX-512: the same bits of codes, the same rounding of bfloat16.

    Args:
        module: the extension, on a CPU with AMX.
    """
    random = np.random.default_rng(0)
    x_TI = random.standard_normal((_ROWS, _INPUTS), np.float32)
    codes_OI = random.integers(0, 256, (_OUTPUTS, _INPUTS), np.uint8)
    scales_O1 = to_bf16_bits(random.uniform(0.01, 0.02, (_OUTPUTS, 1)).astype(np.float32))
    zero_points_O1 = random.integers(0, 256, (_OUTPUTS, 1), np.uint8)
    values_OI = to_bf16_bits(random.standard_normal((_OUTPUTS, _INPUTS), np.float32))
    whole = {"mask": np.ones((1, 1), np.uint8)}
    everywhere = {"mask": np.packbits(np.ones((_OUTPUTS, _INPUTS), np.bool_), axis=1, bitorder="little")}
    codes = {"codes": codes_OI, "scales": scales_O1}

    def agree(tolerance: float, format: str, integers: dict[str, int], **arrays: object) -> bool:
        products = []
        for isa in ("avx512", "amx"):
            weights = module.prepare(format, isa, _OUTPUTS, _INPUTS, integers, arrays)
            y_TO = np.empty((_ROWS, _OUTPUTS), np.float32)
            module.matmul(x_TI, [weights], [y_TO])
            products.append(y_TO)
        return bool(np.abs(products[0] - products[1]).max() <= tolerance)

    # Sums of 1100 products of unit size: float32 rounds them by some 1e-4, other activations change them by 1e-2.
    rounding = 2e-3
    return (
        agree(0, "dense-int8-v1", {"symmetric": 1}, **codes)
        and agree(0, "dense-int8-v1", {"symmetric": 0}, zero_points=zero_points_O1, **codes)
        and agree(0, "block-int8-v1", {"symmetric": 1, **_BLOCK}, **whole, **codes)
        and agree(rounding, "dense-bf16-v1", {}, values=values_OI)
        and agree(rounding, "bitmask-bf16-v1", {}, values=values_OI, **everywhere)
        and agree(rounding, "block-bf16-v1", _BLOCK, values=values_OI, **whole)
    )
