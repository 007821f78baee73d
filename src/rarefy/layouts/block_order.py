"""The order of entries in block layouts: one block after the other. Shape suffixes: O out, I in, R, C rows and columns
of blocks, r, c rows and columns of a block.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.patterns import MAX_BLOCK, Blocks
from rarefy.layouts import base
from rarefy.layouts.base import ArraySpec, Meta

BoolArray = npt.NDArray[np.bool_]

_Scalar = TypeVar("_Scalar", np.uint8, np.uint16, np.float32, np.bool_)


def read_blocks(format: str, meta: Meta) -> Blocks:
    """Read block_shape; the sparsity of the result means nothing."""
    shape = meta["block_shape"]
    if not isinstance(shape, list | tuple):
        raise LayoutError(format, f"block_shape {shape!r:.60}", allowed="two integers")
    sizes = all(type(size) is int and 1 <= size <= MAX_BLOCK for size in shape)
    if len(shape) != 2 or not sizes:
        raise LayoutError(format, f"block_shape {shape!r:.60}", allowed=f"two integers in [1, {MAX_BLOCK}]")
    return Blocks((shape[0], shape[1]), 0.0)


def block_mask_spec(blocks: Blocks, shape: tuple[int, int]) -> ArraySpec:
    """One bit per block, rows of blocks padded to whole bytes."""
    return base.mask_spec(blocks.grid_shape(shape))


def check_block_mask(format: str, mask_RB: npt.NDArray[np.uint8], blocks: Blocks, meta: Meta) -> None:
    """The padding bits are 0, and the blocks that are marked hold as many entries as are stored."""
    shape = base.read_shape(format, {"shape": meta["shape"]})
    num_across = blocks.grid_shape(shape)[1]
    base.check_mask(format, mask_RB, num_across)
    found = count_entries(base.unpack_mask(mask_RB, num_across), blocks, shape)
    if found != meta["num_values"]:
        raise LayoutError(f"{format} mask", f"blocks of {found} entries", allowed=f"{meta['num_values']} entries")


def count_entries(mask_RC: BoolArray, blocks: Blocks, shape: tuple[int, int]) -> int:
    """Entries in the blocks that are marked."""
    rows_R, columns_C = (
        np.minimum(size, extent - np.arange(0, extent, size))
        for size, extent in zip(blocks.block_shape, shape, strict=True)
    )
    return int(rows_R @ (mask_RC.astype(np.int64) @ columns_C)) if mask_RC.size else 0


def to_stream(values_OI: npt.NDArray[_Scalar], mask_RC: BoolArray, blocks: Blocks) -> npt.NDArray[_Scalar]:
    """The entries of the marked blocks, block after block, row-major in each."""
    stored = _by_block(values_OI, blocks)[mask_RC]
    if blocks.is_even(_shape(values_OI)):
        return stored.reshape(-1)
    inside = _by_block(np.ones(values_OI.shape, dtype=np.bool_), blocks)[mask_RC]
    return stored[inside]


def from_stream(
    stream: npt.NDArray[_Scalar], mask_RC: BoolArray, blocks: Blocks, out_OI: npt.NDArray[_Scalar]
) -> npt.NDArray[_Scalar]:
    """Inverse of to_stream: put the stored entries into `out_OI`, which keeps its own where nothing is stored."""
    by_block = _by_block(out_OI, blocks)
    if blocks.is_even(_shape(out_OI)):
        by_block[mask_RC] = stream.reshape(-1, *by_block.shape[2:])
    else:
        marked = _by_block(np.ones(out_OI.shape, dtype=np.bool_), blocks) & mask_RC[:, :, None, None]
        by_block[marked] = stream
    num_down, num_across, rows, columns = by_block.shape
    matrix = by_block.transpose(0, 2, 1, 3).reshape(num_down * rows, num_across * columns)
    return np.ascontiguousarray(matrix[: out_OI.shape[0], : out_OI.shape[1]])


def entry_mask(mask_RC: BoolArray, blocks: Blocks, shape: tuple[int, int]) -> BoolArray:
    """True where an entry lies in a marked block, bool (O, I)."""
    rows, columns = _clipped(blocks, shape)
    mask_OI = np.repeat(np.repeat(mask_RC, rows, axis=0), columns, axis=1)
    return np.ascontiguousarray(mask_OI[: shape[0], : shape[1]])


def blocks_of(mask_OI: BoolArray, blocks: Blocks) -> BoolArray:
    """True for a block with any entry marked, bool (R, C)."""
    marked: BoolArray = np.logical_or.reduce(_by_block(mask_OI, blocks), axis=(2, 3))
    return marked


def _by_block(values_OI: npt.NDArray[_Scalar], blocks: Blocks) -> npt.NDArray[_Scalar]:
    """A new array (R, C, r, c), padded with zeros."""
    shape = _shape(values_OI)
    num_down, num_across = blocks.grid_shape(shape)
    rows, columns = _clipped(blocks, shape)
    padded = np.zeros((num_down * rows, num_across * columns), dtype=values_OI.dtype)
    padded[: shape[0], : shape[1]] = values_OI
    return np.ascontiguousarray(padded.reshape(num_down, rows, num_across, columns).transpose(0, 2, 1, 3))


def _clipped(blocks: Blocks, shape: tuple[int, int]) -> tuple[int, int]:
    # a block may be far larger than the matrix, which must not cost memory
    return min(blocks.block_shape[0], max(1, shape[0])), min(blocks.block_shape[1], max(1, shape[1]))


def _shape(values_OI: npt.NDArray[np.generic]) -> tuple[int, int]:
    return values_OI.shape[0], values_OI.shape[1]
