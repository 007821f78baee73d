"""Scales and zero points between their stored form and core.grids."""

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import (
    FittedGrid,
    Float32Array,
    IntGrid,
    Uint8Array,
    Uint16Array,
    dequantize,
    expand_groups,
    from_bf16_bits,
    to_bf16_bits,
)


def fitted_grid(grid: IntGrid, scales: Uint16Array, zero_points: Uint8Array | None) -> FittedGrid:
    """Widen stored scales (bfloat16 bits); fill in the zero points that a symmetric grid does not store."""
    if zero_points is None:
        zero_points = np.full(scales.shape, grid.middle, dtype=np.uint8)
    return FittedGrid(grid, from_bf16_bits(scales), zero_points)


def stored_grid(fitted: FittedGrid) -> tuple[Uint16Array, Uint8Array | None]:
    """The inverse: scales as bfloat16 bits, and the zero points or None."""
    zero_points = None if fitted.grid.symmetric else np.ascontiguousarray(fitted.zero_point_OG)
    return to_bf16_bits(fitted.scale_OG), zero_points


def dequantize_stream(stream: Uint8Array, mask_OI: npt.NDArray[np.bool_], fitted: FittedGrid) -> Float32Array:
    """Spread stored codes over their positions and dequantize: float32 (O, I), exactly 0 where nothing is stored."""
    width = mask_OI.shape[1]
    codes_OI = np.empty(mask_OI.shape, dtype=np.uint8)
    codes_OI[:] = expand_groups(fitted.zero_point_OG, fitted.grid, width)  # the zero point is the code of 0
    codes_OI[mask_OI] = stream
    return dequantize(codes_OI, fitted)
