"""The numpy reference of the products: what the compiled kernels must compute, and what runs where there are none.

Shapes: T rows of activations, O outputs, I inputs, B blocks of 64 inputs, G weight groups.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from rarefy.core.grids import expand_groups, from_bf16_bits
from rarefy.layouts import Binary, BitmaskInt, DenseInt, Layout, NMInt, Ternary

Float32Array = NDArray[np.float32]

BLOCK: Final = 64
"""Columns that share one activation scale."""


def quantize_activations(x_TI: Float32Array) -> tuple[NDArray[np.int8], Float32Array]:
    """Quantize each row in blocks of 64 columns to [-127, 127], the last block padded with zeros.

    amax = max |x| of the block, inv = float32(127) / amax, q = rint(x * inv), half to even,
    scale = amax / float32(127).
    A block whose amax is 0, or so small that inv overflows, becomes zeros with scale 0. A block that holds a NaN or an
    infinity becomes zeros with scale NaN, which makes every output of the row NaN.

    Args:
        x_TI: float32 (T, I).

    Returns:
        q int8 (T, B * 64) and scale float32 (T, B).
    """
    num_rows, num_inputs = x_TI.shape
    num_blocks = -(-num_inputs // BLOCK)
    x = np.zeros((num_rows, num_blocks * BLOCK), np.float32)
    x[:, :num_inputs] = x_TI
    x = x.reshape(num_rows, num_blocks, BLOCK)
    amax_TB = np.abs(x).max(axis=2)
    finite_TB = np.isfinite(amax_TB)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inv_TB = np.float32(127) / amax_TB
        usable_TB = finite_TB & np.isfinite(inv_TB)
        scaled = np.where(usable_TB[:, :, None], x * np.where(usable_TB, inv_TB, 0)[:, :, None], np.float32(0))
    q = np.clip(np.rint(scaled), -127, 127).astype(np.int8)
    scale_TB = np.where(usable_TB, amax_TB / np.float32(127), np.float32(0))
    scale_TB = np.where(finite_TB, scale_TB, np.float32(np.nan)).astype(np.float32)
    return q.reshape(num_rows, num_blocks * BLOCK), scale_TB


def group_size_of(meta: Mapping[str, Any]) -> int:
    """Columns per scale of a layout with this meta(); 0 where a row has one scale, and for floats."""
    return int(meta.get("group_size") or 0)


def integer_levels(layout: Layout) -> tuple[NDArray[np.int16], Float32Array] | None:
    """Integers and scales of a layout: weight = scale_OG[o, i // group_size] * level_OI[o, i].

    Args:
        layout: any.

    Returns:
        level = code - zero_point, 0 where pruned, int16 (O, I); scale float32 (O, G). None if the weights are floats.
    """
    match layout:
        case DenseInt() | BitmaskInt() | NMInt():
            fitted, width = layout.fitted, layout.shape[1]
            zero_point = np.broadcast_to(expand_groups(fitted.zero_point_OG, fitted.grid, width), layout.shape)
            if isinstance(layout, DenseInt):
                return layout.codes_OI().astype(np.int16) - zero_point, fitted.scale_OG
            mask_OI = layout.mask_OI()
            level_OI = np.zeros(layout.shape, np.int16)
            level_OI[mask_OI] = layout.stream().astype(np.int16) - zero_point[mask_OI]
            return level_OI, fitted.scale_OG
        case Ternary() | Binary():
            return layout.levels_OI().astype(np.int16), from_bf16_bits(layout.scales)
        case _:
            return None


@final
class ReferenceWeights:
    """A weight prepared for numpy: dense float32, or integers in float32 with their scales."""

    def __init__(self, layout: Layout) -> None:
        self.shape = layout.shape
        integers = integer_levels(layout)
        if integers is None:
            self._weight_OI = np.ascontiguousarray(layout.to_dense())
            self._scale_OG = None
            return
        level_OI, self._scale_OG = integers
        self._weight_OI = level_OI.astype(np.float32)
        self._group_size = group_size_of(layout.meta()) or max(self.shape[1], 1)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._weight_OI.nbytes + (0 if self._scale_OG is None else self._scale_OG.nbytes)

    def matmul(self, x_TI: Float32Array) -> Float32Array:
        """x @ W^T with float32 sums; int weights meet quantized activations, exactly inside each segment.

        A segment is the intersection of a block of 64 columns and a weight group. Its integer sum is below 2^24, so
        float32 holds every partial sum of the BLAS call exactly.
        """
        num_outputs, num_inputs = self.shape
        if self._scale_OG is None:
            with np.errstate(invalid="ignore", over="ignore"):
                y: Float32Array = x_TI @ self._weight_OI.T
            return y
        y_TO = np.zeros((x_TI.shape[0], num_outputs), np.float32)
        q, s_TB = quantize_activations(x_TI)
        bounds = sorted({*range(0, num_inputs, BLOCK), *range(0, num_inputs, self._group_size), num_inputs})
        with np.errstate(over="ignore", invalid="ignore"):
            for begin, end in pairwise(bounds):
                dot_TO = q[:, begin:end].astype(np.float32) @ self._weight_OI[:, begin:end].T
                scale_O = self._scale_OG[:, begin // self._group_size]
                y_TO += dot_TO * (s_TB[:, begin // BLOCK, None] * scale_O)
        return y_TO
