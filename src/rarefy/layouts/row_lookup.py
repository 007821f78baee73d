"""Where the entries of some rows lie in the stream of a sparse layout, so that an embedding can look them up.

Shape suffixes: O out, I in, B bytes of a row, N rows that are looked up, C columns of blocks, S entries of those rows.
"""

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, Uint8Array, Uint16Array, from_bf16_bits
from rarefy.core.patterns import Blocks
from rarefy.layouts import base
from rarefy.layouts.scales import dequantize_stream, fitted_grid

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]


def row_starts(mask_OB: Uint8Array) -> Int64Array:
    """The place in the stream where each row begins, and where the last one ends: int64 (O + 1,)."""
    counts_O = base.POPCOUNT[mask_OB].sum(axis=1, dtype=np.int64)
    return np.concatenate([[0], np.cumsum(counts_O)]).astype(np.int64)


def row_places(mask_NI: BoolArray, starts_N: Int64Array) -> Int64Array:
    """Places in the stream of the stored entries of some rows, in row-major order.

    Args:
        mask_NI: True where an entry is stored.
        starts_N: where each row begins.
    """
    counts_N = np.count_nonzero(mask_NI, axis=1)
    ahead_N = np.cumsum(counts_N) - counts_N
    return np.repeat(starts_N - ahead_N, counts_N) + np.arange(int(counts_N.sum()))


def stripe_starts(mask_RC: BoolArray, blocks: Blocks, shape: tuple[int, int]) -> Int64Array:
    """The place in the stream where each row of blocks begins: int64 (R,)."""
    rows_R, columns_C = _sizes(blocks, shape)
    counts_R = rows_R * (mask_RC.astype(np.int64) @ columns_C)
    return np.asarray(np.cumsum(counts_R) - counts_R, dtype=np.int64)


def block_row_places(
    index_N: Int64Array, mask_RC: BoolArray, starts_R: Int64Array, blocks: Blocks, shape: tuple[int, int]
) -> tuple[BoolArray, Int64Array]:
    """Which entries of some rows lie in stored blocks, (N, I), and their places in the stream, in row-major order."""
    rows_R, columns_C = _sizes(blocks, shape)
    stripe_N, inner_N = index_N // blocks.block_shape[0], index_N % blocks.block_shape[0]
    column_I = np.arange(shape[1])
    block_I = column_I // blocks.block_shape[1]
    mask_NC = mask_RC[stripe_N]
    width_NC = mask_NC * columns_C
    ahead_NC = (np.cumsum(width_NC, axis=1) - width_NC) * rows_R[stripe_N][:, None]
    first_NC = starts_R[stripe_N][:, None] + ahead_NC + inner_N[:, None] * columns_C
    mask_NI = mask_NC[:, block_I]
    place_NI = first_NC[:, block_I] + column_I % blocks.block_shape[1]
    return mask_NI, place_NI[mask_NI]


def float_rows(mask_NI: BoolArray, bits_S: Uint16Array) -> Float32Array:
    """Rows of which the stored entries are these bfloat16 bits, float32 (N, I)."""
    rows_NI = np.zeros(mask_NI.shape, dtype=np.float32)
    rows_NI[mask_NI] = from_bf16_bits(bits_S)
    return rows_NI


def int_rows(mask_NI: BoolArray, codes_S: Uint8Array, fitted: FittedGrid) -> Float32Array:
    """Rows of which the stored entries are these codes, float32 (N, I); `fitted` is that of the rows."""
    return dequantize_stream(codes_S, mask_NI, fitted)


def fitted_rows(index_N: Int64Array, grid: IntGrid, scales: Uint16Array, zero_points: Uint8Array | None) -> FittedGrid:
    """The grid of some rows."""
    return fitted_grid(grid, scales[index_N], None if zero_points is None else zero_points[index_N])


def codes_at(packed: Uint8Array, place_S: Int64Array, num_bits: int) -> Uint8Array:
    """The codes at some places of one run of codes, one per byte."""
    first_S = place_S * num_bits
    byte_S, shift_S = first_S >> 3, (first_S & 7).astype(np.uint16)
    pair_S = packed[byte_S].astype(np.uint16)
    if num_bits == 3:  # the only codes that may lie across two bytes
        pair_S |= packed[np.minimum(byte_S + 1, len(packed) - 1)].astype(np.uint16) << np.uint16(8)
    return np.asarray((pair_S >> shift_S) & np.uint16(2**num_bits - 1), dtype=np.uint8)


def flat(indices: npt.ArrayLike) -> tuple[Int64Array, tuple[int, ...]]:
    """Integer indices as int64 (N,), and the shape that they had."""
    index = np.asarray(indices)
    return index.reshape(-1).astype(np.int64), index.shape


def _sizes(blocks: Blocks, shape: tuple[int, int]) -> tuple[Int64Array, Int64Array]:
    """Rows of each row of blocks, and columns of each column of blocks."""
    rows_R, columns_C = (
        np.minimum(size, extent - np.arange(0, extent, size))
        for size, extent in zip(blocks.block_shape, shape, strict=True)
    )
    return rows_R, columns_C
