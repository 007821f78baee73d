"""dense-int8-v1, -int4-, -int3- and -int2-: every entry of the matrix as a code on an integer grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import (
    FittedGrid,
    Float32Array,
    IntGrid,
    Uint8Array,
    Uint16Array,
    dequantize,
    expand_groups,
    from_bf16_bits,
)
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.scales import fitted_grid


@final
@dataclass(frozen=True, eq=False)
class DenseInt:
    """Row-major unsigned codes; value = scale * (code - zero_point).

    Bytes (version 1), all little-endian:
        codes: uint8 (O, ceil(b * I / 8)) for b bits: each row is a run of bits, least significant first, in which
            column i has bits [b * i, b * (i + 1)); the bits that fill up the last byte are 0.
        scales: uint16 (O, G), bfloat16 bits in [2**-126, 2**119], one per group of `group_size` columns (the last
            may be shorter) or one per row.
        zero_points: uint8 (O, G) in [0, 2**num_bits - 1]; absent if symmetric, then 2**(num_bits - 1).

    Args:
        shape: (O, I).
        grid: the integer grid.
        codes: as above.
        scales: as above.
        zero_points: as above; None if symmetric.
    """

    shape: tuple[int, int]
    grid: IntGrid
    codes: Uint8Array
    scales: Uint16Array
    zero_points: Uint8Array | None

    @property
    def format(self) -> str:
        """dense-int8-v1, dense-int4-v1, ..."""
        return f"dense-int{self.grid.num_bits}-v1"

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def fitted(self) -> FittedGrid:
        """The grid with its scales and zero points."""
        return fitted_grid(self.grid, self.scales, self.zero_points)

    def codes_OI(self) -> Uint8Array:  # noqa: N802 (shape suffix)
        """One code per byte, uint8 (O, I)."""
        return base.unpack_codes(self.codes, self.shape[1], self.grid.num_bits)

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return dequantize(self.codes_OI(), self.fitted)

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index = np.asarray(indices)
        flat = index.reshape(-1)
        width = self.shape[1]
        # dequantize does the same; its checks of the grid would take most of the time of one row
        values = base.unpack_codes(self.codes[flat], width, self.grid.num_bits).astype(np.float32)
        if self.zero_points is None:
            values -= np.float32(self.grid.middle)
        else:
            values -= expand_groups(self.zero_points[flat], self.grid, width)
        values *= expand_groups(from_bf16_bits(self.scales[flat]), self.grid, width)
        return values.reshape(*index.shape, width)

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        arrays: dict[str, Array] = {"codes": self.codes, "scales": self.scales}
        if self.zero_points is not None:
            arrays["zero_points"] = self.zero_points
        return arrays

    def meta(self) -> dict[str, MetaValue]:
        """Shape and grid; num_bits is in the format's name."""
        return {"shape": list(self.shape), "group_size": self.grid.group_size, "symmetric": self.grid.symmetric}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        num_bits = base.bits_of(format, "dense")
        rows, width = base.read_shape(format, meta, "group_size", "symmetric")
        grid = base.read_grid(format, num_bits, meta)
        return {"codes": (base.UINT8, (rows, base.code_bytes(width, num_bits))), **base.grid_spec(grid, (rows, width))}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        shape = base.read_shape(format, meta, "group_size", "symmetric")
        grid = base.read_grid(format, base.bits_of(format, "dense"), meta)
        codes = cast(Uint8Array, arrays["codes"])
        base.check_code_padding(format, codes, shape[1], grid.num_bits)
        base.check_grid_arrays(format, grid, arrays)
        return cls(
            shape,
            grid,
            codes,
            cast(Uint16Array, arrays["scales"]),
            cast("Uint8Array | None", arrays.get("zero_points")),
        )
