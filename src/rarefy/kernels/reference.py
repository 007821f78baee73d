"""The numpy reference of the products: what the compiled kernels must compute, and what runs where there are none.

Shapes: T rows of activations, O outputs, I inputs, B blocks of 64 inputs, G weight groups.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from rarefy.core.grids import from_bf16_bits, to_bf16_bits
from rarefy.layouts import Layout, LookupTable

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


def round_activations(x_TI: Float32Array) -> Float32Array:
    """Round each number to bfloat16, the nearest, ties to even; those below 2^-126 become zeros.

    Args:
        x_TI: float32, any shape; a NaN or an infinity stays one.
    """
    rounded_TI = from_bf16_bits(to_bf16_bits(x_TI))
    rounded_TI[np.abs(x_TI) < np.finfo(np.float32).tiny] = 0
    return rounded_TI


def is_integer(layout_format: str) -> bool:
    """Whether products with weights of this format quantize the activations: their values are scale * integer."""
    return "-int" in layout_format or layout_format in ("ternary-v1", "binary-v1")


def is_bf16(layout_format: str) -> bool:
    """Whether products with weights of this format round the activations to bfloat16, as the weights are, or the
    entries of their table."""
    return "-bf16" in layout_format or layout_format in ("lut4-v1", "lut8-v1")


def multiplied_weights(layout: Layout) -> Float32Array:
    """The float32 numbers (O, I) that activations meet: those of `to_dense`, but entries of a table are rounded to
    bfloat16 before their scale, which is one too, so that the product of both is exact."""
    if isinstance(layout, LookupTable) and layout.num_bits == 4:
        layout = replace(layout, table=round_activations(layout.table_K))
    return layout.to_dense()


def integer_levels(layout: Layout) -> tuple[Float32Array, Float32Array, int]:
    """Integers and scales of an int layout: weight = scale_OG[o, i // group_size] * level_OI[o, i].

    The scales are bfloat16 and the integers have at most 9 bits, so that the float32 weights are exact, and dividing
    them by their scales gives the integers back.

    Args:
        layout: a layout with the array `scales`, and `group_size` in its metadata: columns per scale, None for one
            scale per row.

    Returns:
        level = code - zero_point, 0 where pruned, float32 (O, I); scale float32 (O, G); the group size.
    """
    num_inputs = layout.shape[1]
    group_size = int(layout.meta().get("group_size") or max(num_inputs, 1))  # type: ignore[arg-type]  # an int or None
    scale_OG = (layout.arrays()["scales"].astype(np.uint32) << 16).view(np.float32)
    level_OI = layout.to_dense()
    for group in range(scale_OG.shape[1]):
        level_OI[:, group * group_size : (group + 1) * group_size] /= scale_OG[:, group, None]
    return level_OI, scale_OG, group_size


@final
class ReferenceWeights:
    """A weight prepared for numpy: dense float32, or integers in float32 with their scales."""

    def __init__(self, layout: Layout) -> None:
        self.shape = layout.shape
        self._rounds = is_bf16(layout.format)
        self._scale_OG: Float32Array | None = None
        if is_integer(layout.format):
            self._weight_OI, self._scale_OG, self._group_size = integer_levels(layout)
        else:
            self._weight_OI = np.ascontiguousarray(multiplied_weights(layout))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._weight_OI.nbytes + (0 if self._scale_OG is None else self._scale_OG.nbytes)

    def matmul(self, x_TI: Float32Array) -> Float32Array:
        """x @ W^T with float32 sums; bfloat16 weights meet rounded activations, int weights quantized ones, exactly
        inside each segment.

        A segment is the intersection of a block of 64 columns and a weight group. Its integer sum is below 2^24, so
        float32 holds every partial sum of the BLAS call exactly.
        """
        num_outputs, num_inputs = self.shape
        if self._scale_OG is None:
            with np.errstate(invalid="ignore", over="ignore"):
                y: Float32Array = (round_activations(x_TI) if self._rounds else x_TI) @ self._weight_OI.T
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
