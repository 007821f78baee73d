"""Scales and zero points between their stored form and core.grids."""

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import (
    FittedGrid,
    Float32Array,
    IntGrid,
    Uint8Array,
    Uint16Array,
    chunks,
    dequantize,
    expand_groups,
    from_bf16_bits,
    to_bf16_bits,
)
from rarefy.layouts.base import num_groups, read_group_size


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


def stored_scales(format: str, scale_OG: Float32Array) -> Uint16Array:
    """Scales as bfloat16 bits; from_arrays checks their range.

    Raises:
        LayoutError: a scale is no bfloat16.
    """
    scale_OG = np.ascontiguousarray(scale_OG, dtype=np.float32)
    bits = to_bf16_bits(scale_OG)
    if not np.array_equal(from_bf16_bits(bits), scale_OG):
        raise LayoutError(f"{format} scales", "a scale that bfloat16 cannot represent", hint="round with core.grids")
    return bits


def expand_scales(scale_OG: Float32Array, group_size: int | None, width: int) -> Float32Array:
    """Repeat a scale per group along the input axis: (O, G) to (O, I), or (O, 1) that broadcasts to it."""
    return expand_groups(scale_OG, IntGrid(8, group_size, True), width)


def group_maximum(format: str, weight_OI: Float32Array, group_size: int | None) -> Float32Array:
    """The largest magnitude of each group, (O, G); 0 for one without columns.

    Raises:
        LayoutError: the group size is impossible, or the weight is no float32 matrix.
    """
    group_size = read_group_size(format, {"group_size": group_size})
    if weight_OI.ndim != 2 or weight_OI.dtype != np.float32:
        raise LayoutError(format, f"weight {weight_OI.dtype} {weight_OI.shape}", allowed="float32 (O, I)")
    rows, width = weight_OI.shape
    if width == 0:
        return np.zeros((rows, num_groups(width, group_size)), dtype=np.float32)
    starts = np.arange(0, width, group_size or width)
    largest = np.empty((rows, len(starts)), dtype=np.float32)
    for chunk in chunks(rows, width):
        np.maximum.reduceat(np.abs(weight_OI[chunk]), starts, axis=1, out=largest[chunk])
    return largest


def group_scales(format: str, weight_OI: Float32Array, group_size: int | None) -> Float32Array:
    """The largest magnitude of each group, (O, G), and 1 for a group of zeros."""
    largest_OG = group_maximum(format, weight_OI, group_size)
    return np.where(largest_OG == 0, np.float32(1), largest_OG)
