"""From a Solution to the layout that stores it, and back."""

import dataclasses
from typing import assert_never

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import NonFiniteError
from rarefy.core.grids import Float32Array, IntGrid, Uint16Array, quantize, to_bf16_bits
from rarefy.core.patterns import NM, Blocks, Pattern, Unstructured
from rarefy.core.ranks import TapRanks
from rarefy.core.solution import Solution
from rarefy.layouts import base
from rarefy.layouts.base import Meta
from rarefy.layouts.binary import Binary
from rarefy.layouts.bitmask_float import BitmaskFloat
from rarefy.layouts.bitmask_int import BitmaskInt
from rarefy.layouts.block_float import BlockFloat
from rarefy.layouts.block_int import BlockInt
from rarefy.layouts.block_order import blocks_of, count_entries, to_stream
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.factored import FloatFormat, choose_factored, pack_factored, unpack_factors
from rarefy.layouts.lookup_table import LookupTable
from rarefy.layouts.low_rank import LowRank
from rarefy.layouts.nm_float import NMFloat
from rarefy.layouts.nm_int import NMInt
from rarefy.layouts.scales import stored_grid
from rarefy.layouts.sum import PARTS, Part, Sum
from rarefy.layouts.tapwise import Tapwise
from rarefy.layouts.ternary import Ternary

# what the matrix of a solution becomes
MatrixLayout = DenseFloat | DenseInt | BitmaskFloat | BitmaskInt | NMFloat | NMInt | BlockFloat | BlockInt
AnyLayout = Part | Sum

# the one list of formats: the loader, the conformance tests, the kernels' tests and the documentation go through it
FORMATS: dict[str, type[AnyLayout]] = {**PARTS, "sum-v1": Sum}


def packed_nbytes(format: str, meta: Meta) -> int:
    """Bytes of all arrays of a layout, from its metadata alone."""
    spec = FORMATS[format].array_spec(format, meta)
    return sum(dtype.itemsize * int(np.prod(shape, dtype=object)) for dtype, shape in spec.values())


def choose_format(
    shape: tuple[int, int],
    pattern: Pattern | None,
    grid: IntGrid | None,
    *,
    rank: int | TapRanks | None = None,
    factor_grid: IntGrid | None = None,
    num_values: int | None = None,
    num_block_values: int | None = None,
    float_format: FloatFormat = "bf16",
) -> tuple[str, int]:
    """Which format `pack` stores a matrix in, and how many bytes that takes: of those that can hold it, the smallest.

    A sparse layout that would be larger than the dense one (its mask costs more than the zeros save) gives way to it.

    Args:
        shape: (O, I).
        pattern: zero pattern, None for dense.
        grid: value grid, None for floats.
        rank: of the factors beside the matrix; None: there are none. A pattern that prunes everything leaves only them.
        factor_grid: of the factors.
        num_values: entries kept by an unstructured or block pattern; None: what its sparsity says.
        num_block_values: entries of the blocks that hold those; None: what the sparsity says, at most.
        float_format: dtype of dense floats. Sparse floats are always bfloat16.

    Returns:
        Format name and bytes of all arrays.
    """
    rows, width = shape
    if rank is not None:
        only_factors = isinstance(pattern, Unstructured) and pattern.sparsity == 1
        matrix = None if only_factors else choose_format(shape, pattern, grid, float_format=float_format)[1]
        dense_bytes = choose_format(shape, None, None, float_format=float_format)
        return choose_factored(shape, rank, factor_grid, matrix, dense_bytes)
    values = float_format if grid is None else f"int{grid.num_bits}"
    sparse_values = "bf16" if grid is None else values
    common: dict[str, object] = {"shape": [rows, width]}
    if grid is not None:
        common |= {"group_size": grid.group_size, "symmetric": grid.symmetric}
    candidates: list[tuple[str, Meta]] = []
    match pattern:
        case None:
            pass
        case NM():
            candidates.append((f"nm-{sparse_values}-v1", {"keep": pattern.keep, "group": pattern.group}))
        case Unstructured():
            if num_values is None:
                num_values = rows * width - round(rows * width * pattern.sparsity)
            candidates.append((f"bitmask-{sparse_values}-v1", {"num_values": num_values}))
        case Blocks():
            if num_block_values is None:
                num_block_values = pattern.max_num_values(shape)
            block_shape = list(pattern.stored(shape).block_shape)
            block_meta = {"block_shape": block_shape, "num_values": num_block_values}
            if f"block-{sparse_values}-v1" in FORMATS:
                candidates.append((f"block-{sparse_values}-v1", block_meta))
            num_values = num_block_values if num_values is None else num_values
            candidates.append((f"bitmask-{sparse_values}-v1", {"num_values": num_values}))
        case _:
            assert_never(pattern)
    candidates.append((f"dense-{values}-v1", {}))
    sizes = [(name, packed_nbytes(name, {**common, **meta})) for name, meta in candidates]
    return min(sizes, key=lambda size: size[1])  # the first of equals: the sparse one


def pack(solution: Solution, *, float_format: FloatFormat = "bf16") -> AnyLayout:
    """Store a solution in the layout that its pattern and grid ask for.

    Args:
        solution: V with its mask, pattern and grid.
        float_format: "bf16" (weights without a grid are rounded to nearest even) or "f32" (dense layouts only).

    Returns:
        nm-* for an N:M pattern, bitmask-* for an unstructured one, block-* for blocks (bitmask-* where those take fewer
        bytes, and for codes of fewer than 8 bits), dense-* without a mask or where the sparse one would be larger. An
        N:M group that keeps fewer entries than its pattern, and a block of which some are kept, is filled up with
        stored zeros. Factors become lowrank-* or tapwise-*, and together with a matrix beside them sum-v1, unless the
        dense matrix takes fewer bytes.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or too large for bfloat16.
        LayoutError: the solution breaks its own invariants (see Solution.check), or has factors on a grid that no
            format of factors holds.
    """
    solution.check()
    if solution.factors is not None:
        return pack_factored(solution, solution.factors, pack_matrix, float_format)
    return pack_matrix(solution, float_format)


def pack_matrix(solution: Solution, float_format: FloatFormat) -> MatrixLayout:
    """Store the matrix of a solution, which has been checked, without its factors."""
    grid = None if solution.grid is None else solution.grid.grid
    mask_OI, pattern = solution.mask_OI, solution.pattern
    if mask_OI is None:
        return _pack_dense(solution, float_format)
    mask_RC, num_block_values = None, None
    if isinstance(pattern, Blocks):
        pattern = pattern.stored(solution.shape)
        mask_RC = blocks_of(mask_OI, pattern)
        num_block_values = count_entries(mask_RC, pattern, solution.shape)
    format, _ = choose_format(
        solution.shape,
        pattern,
        grid,
        num_values=int(np.count_nonzero(mask_OI)),
        num_block_values=num_block_values,
        float_format=float_format,
    )
    if format.startswith("dense-"):
        return _pack_dense(solution, float_format)
    if isinstance(pattern, NM):
        return _pack_nm(solution, pattern, _fill_groups(mask_OI, pattern))
    if isinstance(pattern, Blocks) and mask_RC is not None and format.startswith("block-"):
        return _pack_blocks(solution, pattern, mask_RC)
    return _pack_bitmask(solution, mask_OI)


def unpack(layout: AnyLayout) -> Solution:
    """The solution that a layout stores; its weights are the stored ones (after rounding).

    No grid of core.grids describes ternary, binary and lookup-table layouts: theirs has none. Of a sum of two matrices
    the solution is the matrix itself.
    """
    match layout:
        case LowRank() | Tapwise():
            return Solution.low_rank(unpack_factors(layout))
        case Sum(first=LowRank() | Tapwise() as pair, second=second) if not isinstance(second, LowRank | Tapwise):
            return dataclasses.replace(unpack(second), factors=unpack_factors(pair), original_OI=None)
        case DenseFloat() | Ternary() | Binary() | LookupTable() | Sum():
            return Solution.dense(layout.to_dense())
        case DenseInt():
            return Solution(layout.to_dense(), None, None, layout.fitted)
        case BitmaskFloat() | BitmaskInt():
            size = layout.shape[0] * layout.shape[1]
            pattern = Unstructured(1.0 - layout.num_values / size if size else 0.0)
            grid = layout.fitted if isinstance(layout, BitmaskInt) else None
            return Solution(layout.to_dense(), layout.mask_OI(), pattern, grid)
        case NMFloat():
            return Solution(layout.to_dense(), layout.mask_OI(), layout.pattern, None)
        case NMInt():
            return Solution(layout.to_dense(), layout.mask_OI(), layout.pattern, layout.fitted)
        case BlockFloat() | BlockInt():
            mask_RC = layout.mask_RC()
            blocks = Blocks(layout.block_shape, 1.0 - float(mask_RC.mean()) if mask_RC.size else 0.0)
            grid = layout.fitted if isinstance(layout, BlockInt) else None
            return Solution(layout.to_dense(), layout.mask_OI(), blocks, grid)
        case _:
            assert_never(layout)


def _pack_dense(solution: Solution, float_format: FloatFormat) -> DenseFloat | DenseInt:
    if solution.grid is None:
        weight = np.ascontiguousarray(solution.weight_OI)
        return DenseFloat(weight if float_format == "f32" else _bf16(weight))
    codes = quantize(solution.weight_OI, solution.grid)
    packed = base.pack_codes(codes, solution.grid.grid.num_bits)
    return DenseInt(solution.shape, solution.grid.grid, packed, *stored_grid(solution.grid))


def _pack_bitmask(solution: Solution, mask_OI: npt.NDArray[np.bool_]) -> BitmaskFloat | BitmaskInt:
    mask = base.pack_mask(mask_OI)
    if solution.grid is None:
        return BitmaskFloat(solution.shape, mask, _bf16(base.take_kept(solution.weight_OI, mask_OI)))
    codes, num_values = _stream(solution, mask_OI)
    return BitmaskInt(solution.shape, solution.grid.grid, num_values, mask, codes, *stored_grid(solution.grid))


def _pack_nm(solution: Solution, pattern: NM, mask_OI: npt.NDArray[np.bool_]) -> NMFloat | NMInt:
    mask = base.pack_mask(mask_OI)
    if solution.grid is None:
        return NMFloat(solution.shape, pattern, mask, _bf16(base.take_kept(solution.weight_OI, mask_OI)))
    codes, _ = _stream(solution, mask_OI)
    return NMInt(solution.shape, solution.grid.grid, pattern, mask, codes, *stored_grid(solution.grid))


def _pack_blocks(solution: Solution, pattern: Blocks, mask_RC: npt.NDArray[np.bool_]) -> BlockFloat | BlockInt:
    mask, block_shape = base.pack_mask(mask_RC), pattern.block_shape
    if solution.grid is None:
        return BlockFloat(solution.shape, block_shape, mask, _bf16(to_stream(solution.weight_OI, mask_RC, pattern)))
    codes = to_stream(quantize(solution.weight_OI, solution.grid), mask_RC, pattern)
    return BlockInt(solution.shape, block_shape, solution.grid.grid, mask, codes, *stored_grid(solution.grid))


def _stream(solution: Solution, mask_OI: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.uint8], int]:
    assert solution.grid is not None
    codes = base.take_kept(quantize(solution.weight_OI, solution.grid), mask_OI)
    return base.pack_codes(codes, solution.grid.grid.num_bits), codes.shape[0]


def _bf16(values: Float32Array) -> Uint16Array:
    bits = to_bf16_bits(values)
    if not base.all_finite_bf16(bits):
        raise NonFiniteError("weight", "a value too large for bfloat16", hint="the input model is likely damaged")
    return bits


def _fill_groups(mask_OI: npt.NDArray[np.bool_], pattern: NM) -> npt.NDArray[np.bool_]:
    """Mark pruned entries as stored, lowest columns first, in groups that keep too few."""
    rows, width = mask_OI.shape
    missing_OG = pattern.keep_counts_G(width) - pattern.count_kept_OG(mask_OI)
    if not np.any(missing_OG):
        return mask_OI
    padded = np.ones((rows, missing_OG.shape[1] * pattern.group), dtype=np.bool_)
    padded[:, :width] = mask_OI
    pruned = ~padded.reshape(rows, -1, pattern.group)
    fill = pruned & (np.cumsum(pruned, axis=2) <= missing_OG[:, :, None])
    return mask_OI | fill.reshape(rows, -1)[:, :width]
