"""Value grids: the numbers that a stored weight may take. Shape suffixes: O out, I in, G groups.

A weight on an integer grid is

    value = scale * (code - zero_point),    code in [0, 2**num_bits - 1]

with `code` and `zero_point` unsigned integers and `scale` a positive, normal bfloat16 number. A bfloat16 has 8
significant bits and code - zero_point at most 8, so the product has at most 16 and is *exact* in float32: every
implementation (numpy, torch, native code, with or without fused multiply-add) dequantizes to the same bits, and
quantize(dequantize(code)) == code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import NonFiniteError, PatternError

Float32Array = npt.NDArray[np.float32]
Uint8Array = npt.NDArray[np.uint8]
Uint16Array = npt.NDArray[np.uint16]

CHUNK_SIZE = 2**17  # entries

_Scalar = TypeVar("_Scalar", np.float32, np.uint8)

NUM_BITS = (2, 3, 4, 8)  # of a code
GROUP_MULTIPLE = 32
MAX_GROUP_SIZE = 2**30  # far beyond any layer, and safe in the 32-bit integers of kernels
MIN_SCALE = float(np.finfo(np.float32).smallest_normal)  # 2**-126, the smallest normal bfloat16 as well
MAX_SCALE = 2.0**119  # 255 * MAX_SCALE is finite in float32


@final
@dataclass(frozen=True)
class IntGrid:
    """An integer grid before it is fitted to a layer.

    Args:
        num_bits: 2, 3, 4 or 8.
        group_size: columns that share one scale, a positive multiple of 32 (the last group of a row may be shorter);
            None: one scale for a whole row (per output channel).
        symmetric: the zero point is 2**(num_bits - 1) everywhere and is not stored.

    Raises:
        PatternError: a field is outside its range.
    """

    num_bits: int
    group_size: int | None
    symmetric: bool

    def __post_init__(self) -> None:
        if type(self.num_bits) is not int or self.num_bits not in NUM_BITS:
            raise PatternError("values", f"num_bits {self.num_bits!r}", allowed="2, 3, 4 or 8")
        size = self.group_size
        if size is not None and (type(size) is not int or not 0 < size <= MAX_GROUP_SIZE or size % GROUP_MULTIPLE):
            raise PatternError(
                "values", f"group_size {size!r}", allowed=f"a multiple of {GROUP_MULTIPLE}, or null (per channel)"
            )
        if type(self.symmetric) is not bool:
            raise PatternError("values", f"symmetric {self.symmetric!r}", allowed="true or false")

    @property
    def max_code(self) -> int:
        """Largest code, 2**num_bits - 1."""
        return int(2**self.num_bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2**(num_bits - 1)."""
        return int(2 ** (self.num_bits - 1))

    def num_groups(self, in_features: int) -> int:
        """Number of scales of one row."""
        return 1 if self.group_size is None else -(-in_features // self.group_size)


@final
@dataclass(frozen=True, eq=False)
class FittedGrid:
    """An integer grid with its scales and zero points.

    Args:
        grid: the specification.
        scale_OG: float32 (O, G), each value exactly representable in bfloat16, in [2**-126, 2**119].
        zero_point_OG: uint8 (O, G), in [0, 2**num_bits - 1]; 2**(num_bits - 1) everywhere if the grid is symmetric.

    Raises:
        PatternError: an array has the wrong dtype, shape or range.
    """

    grid: IntGrid
    scale_OG: Float32Array
    zero_point_OG: Uint8Array

    def __post_init__(self) -> None:
        scale, zero = self.scale_OG, self.zero_point_OG
        if scale.dtype != np.float32 or scale.ndim != 2:
            raise PatternError("grid", f"scales {scale.dtype} {scale.shape}", allowed="float32 (O, G)")
        if zero.dtype != np.uint8 or zero.shape != scale.shape:
            raise PatternError("grid", f"zero points {zero.dtype} {zero.shape}", allowed=f"uint8 {scale.shape}")
        # written so that NaN fails
        if not np.all((scale >= MIN_SCALE) & (scale <= MAX_SCALE)):
            raise PatternError("grid", "a scale that is not finite, positive and normal", allowed="[2**-126, 2**119]")
        if np.any(scale.view(np.uint32) & np.uint32(0xFFFF)):
            raise PatternError("grid", "a scale that bfloat16 cannot represent", hint="round with round_scale")
        if self.grid.symmetric:
            if np.any(zero != self.grid.middle):
                raise PatternError("grid", "a zero point of a symmetric grid", allowed=str(self.grid.middle))
        elif np.any(zero > self.grid.max_code):
            raise PatternError("grid", "a zero point out of range", allowed=f"[0, {self.grid.max_code}]")


def to_bf16_bits(values: Float32Array) -> Uint16Array:
    """Round float32 to bfloat16 (nearest, ties to even; NaN stays a quiet NaN) and return the 16 bits of each.

    Args:
        values: float32, any shape.

    Returns:
        uint16, same shape. A finite value above the largest bfloat16 becomes infinity, as IEEE 754 rounding says.
    """
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32)
    result = np.empty(flat.shape, dtype=np.uint16)
    for chunk in chunks(flat.shape[0], 1):
        bits = flat[chunk]
        rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        result[chunk] = rounded >> np.uint32(16)
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        if np.any(nan):
            result[chunk][nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x0040)
    return result.reshape(np.shape(values))


def from_bf16_bits(bits: Uint16Array) -> Float32Array:
    """Widen bfloat16 bits (uint16, any shape) to float32, exactly."""
    wide = np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32).reshape(np.shape(bits))


def round_scale(scale: npt.NDArray[np.floating]) -> Float32Array:
    """Round scales to the nearest bfloat16 inside the range that a grid allows.

    Args:
        scale: any float dtype and shape, finite, not negative.

    Returns:
        float32 of the same shape, fit for FittedGrid.
    """
    clipped = np.clip(scale, MIN_SCALE, MAX_SCALE).astype(np.float32)
    return from_bf16_bits(to_bf16_bits(clipped))


def fit_minmax(weight_OI: Float32Array, grid: IntGrid) -> FittedGrid:
    """Choose the smallest scale with which no weight of a group is clipped by more than the rounding to bfloat16.

    Symmetric: scale = max(max(w) / (2**(b-1) - 1), -min(w) / 2**(b-1)). Asymmetric: the range is widened to contain 0,
    scale = (max - min) / (2**b - 1), zero_point = round(-min / scale), so that 0 is represented exactly. The scale is
    rounded to the nearest bfloat16, or up where rounding down would push an end of the range off the grid. A group
    of zeros only gets scale 1 and codes equal to the zero point.

    Args:
        weight_OI: float32 (O, I), finite. Pruned zeros do no harm: 0 is in every range.
        grid: the specification.

    Returns:
        The fitted grid, G = grid.num_groups(I).

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    low_OG, high_OG = _group_range(weight_OI, grid)
    if not (np.all(np.isfinite(low_OG)) and np.all(np.isfinite(high_OG))):
        raise NonFiniteError("weight", "NaN or infinity", hint="the input model is damaged; run rarefy inspect on it")
    # float64: max - min of two finite float32 can overflow float32
    low = np.minimum(low_OG, 0.0).astype(np.float64)
    high = np.maximum(high_OG, 0.0).astype(np.float64)
    symmetric_scale = np.maximum(high / (grid.middle - 1), -low / grid.middle)
    exact = symmetric_scale if grid.symmetric else (high - low) / grid.max_code
    scale = round_scale(np.where(exact == 0.0, 1.0, exact))
    clips = _off_grid(low, high, scale, grid) & (scale < exact) & (scale < MAX_SCALE)
    scale = np.where(clips, _next_bf16(scale), scale)
    return FittedGrid(grid, scale, _zero_point(low, scale, grid))


def quantize(weight_OI: Float32Array, fitted: FittedGrid) -> Uint8Array:
    """Round each weight to the nearest code: clip(rint(w / scale) + zero_point, 0, 2**num_bits - 1).

    The quotient is a float32 division and ties go to even, so that torch computes the same codes.

    Args:
        weight_OI: float32 (O, I), finite.
        fitted: grid with G = num_groups(I).

    Returns:
        uint8 (O, I).
    """
    width = _check_width(weight_OI.shape, fitted)
    codes_OI = np.empty(weight_OI.shape, dtype=np.uint8)
    for rows in chunks(*weight_OI.shape):
        quotient = weight_OI[rows] / expand_groups(fitted.scale_OG[rows], fitted.grid, width)
        np.rint(quotient, out=quotient)
        quotient += expand_groups(fitted.zero_point_OG[rows], fitted.grid, width)
        np.clip(quotient, 0, fitted.grid.max_code, out=quotient)
        codes_OI[rows] = quotient
    return codes_OI


def dequantize(codes_OI: Uint8Array, fitted: FittedGrid) -> Float32Array:
    """Compute float32(scale) * float32(code - zero_point); exact, see the top of the file.

    Args:
        codes_OI: uint8 (O, I).
        fitted: grid with G = num_groups(I).

    Returns:
        float32 (O, I).
    """
    width = _check_width(codes_OI.shape, fitted)
    values_OI = np.empty(codes_OI.shape, dtype=np.float32)
    for rows in chunks(*codes_OI.shape):
        values = values_OI[rows]
        zero_point = expand_groups(fitted.zero_point_OG[rows], fitted.grid, width)
        np.subtract(codes_OI[rows], zero_point, out=values, dtype=np.float32)  # in uint8 it would wrap around
        values *= expand_groups(fitted.scale_OG[rows], fitted.grid, width)
    return values_OI


def chunks(rows: int, width: int) -> Iterator[slice]:
    """Cut the rows of a matrix into runs whose temporaries stay in the cache, whatever the size of the matrix."""
    step = max(1, CHUNK_SIZE // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def expand_groups(per_group_OG: npt.NDArray[_Scalar], grid: IntGrid, width: int) -> npt.NDArray[_Scalar]:
    """Repeat a value per group along the input axis: (O, G) to (O, I), or (O, 1) that broadcasts to it."""
    if grid.group_size is None or per_group_OG.shape[1] == 1:
        return per_group_OG
    return np.repeat(per_group_OG, grid.group_size, axis=1)[:, :width]


def _check_width(shape: tuple[int, ...], fitted: FittedGrid) -> int:
    expected = (fitted.scale_OG.shape[0], fitted.scale_OG.shape[1])
    if len(shape) != 2 or (shape[0], fitted.grid.num_groups(shape[1])) != expected:
        raise PatternError("grid", f"weight of shape {shape} for scales of shape {expected}")
    return shape[1]


def _group_range(weight_OI: Float32Array, grid: IntGrid) -> tuple[Float32Array, Float32Array]:
    rows, width = weight_OI.shape
    if width == 0:
        empty = np.zeros((rows, grid.num_groups(0)), dtype=np.float32)
        return empty, empty
    starts = np.arange(0, width, grid.group_size or width)
    return np.minimum.reduceat(weight_OI, starts, axis=1), np.maximum.reduceat(weight_OI, starts, axis=1)


def _zero_point(low: npt.NDArray[np.float64], scale: Float32Array, grid: IntGrid) -> Uint8Array:
    if grid.symmetric:
        return np.full(scale.shape, grid.middle, dtype=np.uint8)
    return np.clip(np.rint(-low / scale), 0, grid.max_code).astype(np.uint8)


def _off_grid(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64], scale: Float32Array, grid: IntGrid
) -> npt.NDArray[np.bool_]:
    zero = _zero_point(low, scale, grid).astype(np.float64)
    top: npt.NDArray[np.bool_] = np.rint(high / scale) + zero > grid.max_code
    return top | (np.rint(low / scale) + zero < 0)


def _next_bf16(scale: Float32Array) -> Float32Array:
    return from_bf16_bits((to_bf16_bits(scale) + np.uint16(1)).astype(np.uint16))
