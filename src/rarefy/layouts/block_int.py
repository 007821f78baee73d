"""block-int8-v1: whole blocks are stored as codes or not at all, and one bit per block says which."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, Uint8Array, Uint16Array, dequantize, expand_groups
from rarefy.core.patterns import Blocks
from rarefy.layouts import base, row_lookup
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.bitmask_int import BitmaskInt
from rarefy.layouts.block_order import block_mask_spec, check_block_mask, entry_mask, from_stream, read_blocks
from rarefy.layouts.scales import fitted_grid

FORMAT = "block-int8-v1"

_KEYS = ("block_shape", "num_values", "group_size", "symmetric")


@final
@dataclass(frozen=True, eq=False)
class BlockInt:
    """A block sparse matrix of codes; value = scale * (code - zero_point) where stored, else 0.

    Bytes (version 1), all little-endian, for R = ceil(O / block rows) and C = ceil(I / block columns):
        mask: uint8 (R, ceil(C / 8)); column j of a row of blocks is bit j % 8 (least significant first) of byte j // 8;
            1 means stored; bits beyond the last column of blocks are 0.
        codes: uint8 (num_values,), the stored blocks in row-major order, each row-major and without padding. A stored
            code may equal the zero point.
        scales: uint16 (O, G), bfloat16 bits in [2**-126, 2**119], one per group of `group_size` columns (the last
            may be shorter) or one per row. Groups count all columns, stored or not.
        zero_points: uint8 (O, G); absent if symmetric, then 128.

    Args:
        shape: (O, I).
        block_shape: rows and columns of a block.
        grid: the integer grid, of 8 bits.
        mask: as above.
        codes: as above.
        scales: as above.
        zero_points: as above; None if symmetric.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    grid: IntGrid
    mask: Uint8Array
    codes: Uint8Array
    scales: Uint16Array
    zero_points: Uint8Array | None

    @property
    def format(self) -> str:
        """block-int8-v1."""
        return FORMAT

    @property
    def num_values(self) -> int:
        """Number of stored entries."""
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def fitted(self) -> FittedGrid:
        """The grid with its scales and zero points."""
        return fitted_grid(self.grid, self.scales, self.zero_points)

    def mask_RC(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where a block is stored, bool (R, C)."""
        return base.unpack_mask(self.mask, self._blocks().grid_shape(self.shape)[1])

    def mask_OI(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where an entry is stored, bool (O, I)."""
        return entry_mask(self.mask_RC(), self._blocks(), self.shape)

    def codes_OI(self) -> Uint8Array:  # noqa: N802 (shape suffix)
        """One code per entry, the zero point where nothing is stored, uint8 (O, I)."""
        codes_OI = np.empty(self.shape, dtype=np.uint8)
        codes_OI[:] = expand_groups(self.fitted.zero_point_OG, self.grid, self.shape[1])
        return from_stream(self.codes, self.mask_RC(), self._blocks(), codes_OI)

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return dequantize(self.codes_OI(), self.fitted)

    def as_bitmask(self) -> BitmaskInt:
        """The same entries with one bit each, in the order of that format."""
        mask_OI = self.mask_OI()
        codes = base.take_kept(self.codes_OI(), mask_OI)
        mask = base.pack_mask(mask_OI)
        return BitmaskInt(self.shape, self.grid, len(codes), mask, codes, self.scales, self.zero_points)

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index_N, shape = row_lookup.flat(indices)
        mask_NI, place_S = row_lookup.block_row_places(
            index_N, self.mask_RC(), self._starts, self._blocks(), self.shape
        )
        codes_S = self.codes[place_S]
        fitted = row_lookup.fitted_rows(index_N, self.grid, self.scales, self.zero_points)
        return row_lookup.int_rows(mask_NI, codes_S, fitted).reshape(*shape, self.shape[1])

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        arrays: dict[str, Array] = {"mask": self.mask, "codes": self.codes, "scales": self.scales}
        if self.zero_points is not None:
            arrays["zero_points"] = self.zero_points
        return arrays

    def meta(self) -> dict[str, MetaValue]:
        """Shape, block shape, number of stored entries and grid."""
        return {
            "shape": list(self.shape),
            "block_shape": list(self.block_shape),
            "num_values": self.num_values,
            "group_size": self.grid.group_size,
            "symmetric": self.grid.symmetric,
        }

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        if format != FORMAT:
            raise LayoutError("format", repr(format), allowed=FORMAT)
        shape = base.read_shape(format, meta, *_KEYS)
        codes = (base.UINT8, (base.read_num_values(format, meta, shape),))
        grid = base.read_grid(format, 8, meta)
        return {**block_mask_spec(read_blocks(format, meta), shape), "codes": codes, **base.grid_spec(grid, shape)}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        blocks = read_blocks(format, meta)
        grid = base.read_grid(format, 8, meta)
        mask = cast(Uint8Array, arrays["mask"])
        check_block_mask(format, mask, blocks, meta)
        base.check_grid_arrays(format, grid, arrays)
        return cls(
            base.read_shape(format, meta, *_KEYS),
            blocks.block_shape,
            grid,
            mask,
            cast(Uint8Array, arrays["codes"]),
            cast(Uint16Array, arrays["scales"]),
            cast("Uint8Array | None", arrays.get("zero_points")),
        )

    def _blocks(self) -> Blocks:
        return Blocks(self.block_shape, 0.0)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return row_lookup.stripe_starts(self.mask_RC(), self._blocks(), self.shape)
