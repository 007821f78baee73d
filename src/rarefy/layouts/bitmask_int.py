"""bitmask-int8-v1, -int4-, -int3- and -int2-: one bit per entry, and the stored ones follow each other as codes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, Uint8Array, Uint16Array
from rarefy.layouts import base, row_lookup
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.scales import dequantize_stream, fitted_grid

_KEYS = ("num_values", "group_size", "symmetric")


@final
@dataclass(frozen=True, eq=False)
class BitmaskInt:
    """An unstructured sparse matrix of codes; value = scale * (code - zero_point) where stored, else 0.

    Bytes (version 1), all little-endian:
        mask: uint8 (O, ceil(I / 8)); column i of a row is bit i % 8 (least significant first) of byte i // 8; 1 means
            stored; bits beyond the last column are 0.
        codes: uint8 (ceil(b * num_values / 8),) for b bits, the stored entries in row-major order, without row
            padding, as a run of bits, least significant first: entry k has bits [b * k, b * (k + 1)); the bits that
            fill up the last byte are 0. A stored code may equal the zero point. num_values is the number of 1 bits.
        scales: uint16 (O, G), bfloat16 bits in [2**-126, 2**119], one per group of `group_size` columns (the last
            may be shorter) or one per row. Groups count all columns, stored or not.
        zero_points: uint8 (O, G) in [0, 2**num_bits - 1]; absent if symmetric, then 2**(num_bits - 1).

    Args:
        shape: (O, I).
        grid: the integer grid.
        num_values: number of stored entries.
        mask: as above.
        codes: as above.
        scales: as above.
        zero_points: as above; None if symmetric.
    """

    shape: tuple[int, int]
    grid: IntGrid
    num_values: int
    mask: Uint8Array
    codes: Uint8Array
    scales: Uint16Array
    zero_points: Uint8Array | None

    @property
    def format(self) -> str:
        """bitmask-int8-v1, bitmask-int4-v1, ..."""
        return f"bitmask-int{self.grid.num_bits}-v1"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def fitted(self) -> FittedGrid:
        """The grid with its scales and zero points."""
        return fitted_grid(self.grid, self.scales, self.zero_points)

    def mask_OI(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where an entry is stored, bool (O, I)."""
        return base.unpack_mask(self.mask, self.shape[1])

    def stream(self) -> Uint8Array:
        """One code per byte, uint8 (num_values,), in row-major order."""
        return base.unpack_codes(self.codes, self.num_values, self.grid.num_bits)

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return dequantize_stream(self.stream(), self.mask_OI(), self.fitted)

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index_N, shape = row_lookup.flat(indices)
        mask_NI = base.unpack_mask(self.mask[index_N], self.shape[1])
        place_S = row_lookup.row_places(mask_NI, self._starts[index_N])
        codes_S = row_lookup.codes_at(self.codes, place_S, self.grid.num_bits)
        fitted = row_lookup.fitted_rows(index_N, self.grid, self.scales, self.zero_points)
        return row_lookup.int_rows(mask_NI, codes_S, fitted).reshape(*shape, self.shape[1])

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        arrays: dict[str, Array] = {"mask": self.mask, "codes": self.codes, "scales": self.scales}
        if self.zero_points is not None:
            arrays["zero_points"] = self.zero_points
        return arrays

    def meta(self) -> dict[str, MetaValue]:
        """Shape, number of stored entries and grid; num_bits is in the format's name."""
        return {
            "shape": list(self.shape),
            "num_values": self.num_values,
            "group_size": self.grid.group_size,
            "symmetric": self.grid.symmetric,
        }

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        num_bits = base.bits_of(format, "bitmask")
        shape = base.read_shape(format, meta, *_KEYS)
        num_values = base.read_num_values(format, meta, shape)
        grid = base.read_grid(format, num_bits, meta)
        return {
            **base.mask_spec(shape),
            "codes": (base.UINT8, (base.code_bytes(num_values, num_bits),)),
            **base.grid_spec(grid, shape),
        }

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        shape = base.read_shape(format, meta, *_KEYS)
        num_values = base.read_num_values(format, meta, shape)
        grid = base.read_grid(format, base.bits_of(format, "bitmask"), meta)
        mask, codes = cast(Uint8Array, arrays["mask"]), cast(Uint8Array, arrays["codes"])
        base.check_mask(format, mask, shape[1])
        base.check_popcount(format, mask, num_values)
        base.check_code_padding(format, codes, num_values, grid.num_bits)
        base.check_grid_arrays(format, grid, arrays)
        zero_points = cast("Uint8Array | None", arrays.get("zero_points"))
        return cls(shape, grid, num_values, mask, codes, cast(Uint16Array, arrays["scales"]), zero_points)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return row_lookup.row_starts(self.mask)
