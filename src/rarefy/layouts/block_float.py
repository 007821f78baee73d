"""block-bf16-v1: whole blocks are stored as bfloat16 or not at all, and one bit per block says which."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import Float32Array, Uint8Array, Uint16Array, from_bf16_bits
from rarefy.core.patterns import Blocks
from rarefy.layouts import base, row_lookup
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.bitmask_float import BitmaskFloat
from rarefy.layouts.block_order import block_mask_spec, check_block_mask, entry_mask, from_stream, read_blocks

FORMAT = "block-bf16-v1"

_KEYS = ("block_shape", "num_values")


@final
@dataclass(frozen=True, eq=False)
class BlockFloat:
    """A block sparse matrix of bfloat16; the blocks at the lower and right edge are smaller.

    Bytes (version 1), all little-endian, for R = ceil(O / block rows) and C = ceil(I / block columns):
        mask: uint8 (R, ceil(C / 8)); column j of a row of blocks is bit j % 8 (least significant first) of byte j // 8;
            1 means stored; bits beyond the last column of blocks are 0.
        values: uint16 (num_values,), the stored blocks in row-major order, each row-major and without padding, as the
            upper 16 bits of a float32; finite. A stored entry may be zero.

    Args:
        shape: (O, I).
        block_shape: rows and columns of a block.
        mask: as above.
        values: as above.
    """

    shape: tuple[int, int]
    block_shape: tuple[int, int]
    mask: Uint8Array
    values: Uint16Array

    @property
    def format(self) -> str:
        """block-bf16-v1."""
        return FORMAT

    @property
    def num_values(self) -> int:
        """Number of stored entries."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.mask.nbytes + self.values.nbytes

    def mask_RC(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where a block is stored, bool (R, C)."""
        return base.unpack_mask(self.mask, self._blocks().grid_shape(self.shape)[1])

    def mask_OI(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where an entry is stored, bool (O, I)."""
        return entry_mask(self.mask_RC(), self._blocks(), self.shape)

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return from_bf16_bits(self._bits_OI())

    def as_bitmask(self) -> BitmaskFloat:
        """The same entries with one bit each, in the order of that format."""
        mask_OI = self.mask_OI()
        return BitmaskFloat(self.shape, base.pack_mask(mask_OI), base.take_kept(self._bits_OI(), mask_OI))

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index_N, shape = row_lookup.flat(indices)
        mask_NI, place_S = row_lookup.block_row_places(
            index_N, self.mask_RC(), self._starts, self._blocks(), self.shape
        )
        return row_lookup.float_rows(mask_NI, self.values[place_S]).reshape(*shape, self.shape[1])

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        return {"mask": self.mask, "values": self.values}

    def meta(self) -> dict[str, MetaValue]:
        """Shape, block shape and number of stored entries."""
        return {"shape": list(self.shape), "block_shape": list(self.block_shape), "num_values": self.num_values}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        if format != FORMAT:
            raise LayoutError("format", repr(format), allowed=FORMAT)
        shape = base.read_shape(format, meta, *_KEYS)
        num_values = base.read_num_values(format, meta, shape)
        return {**block_mask_spec(read_blocks(format, meta), shape), "values": (base.UINT16, (num_values,))}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        blocks = read_blocks(format, meta)
        mask, values = cast(Uint8Array, arrays["mask"]), cast(Uint16Array, arrays["values"])
        check_block_mask(format, mask, blocks, meta)
        base.check_finite_bf16(format, values)
        return cls(base.read_shape(format, meta, *_KEYS), blocks.block_shape, mask, values)

    def _blocks(self) -> Blocks:
        return Blocks(self.block_shape, 0.0)

    def _bits_OI(self) -> Uint16Array:  # noqa: N802 (shape suffix)
        return from_stream(self.values, self.mask_RC(), self._blocks(), np.zeros(self.shape, dtype=np.uint16))

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return row_lookup.stripe_starts(self.mask_RC(), self._blocks(), self.shape)
