"""binary-v1: every entry is -s or +s, with one s for each group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import Float32Array, Uint8Array, Uint16Array, chunks, from_bf16_bits
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.scales import expand_scales, group_scales, stored_scales

_FORMAT = "binary-v1"


@final
@dataclass(frozen=True, eq=False)
class Binary:
    """Row-major bits; value = scale where the bit is 1, -scale where it is 0. No entry is 0.

    Bytes (version 1), all little-endian:
        codes: uint8 (O, ceil(I / 8)); column i of a row is bit i % 8 (least significant first) of byte i // 8; bits
            beyond the last column are 0.
        scales: uint16 (O, G), bfloat16 bits in [2**-126, 2**119], one per group of `group_size` columns (the last
            may be shorter) or one per row.

    Args:
        shape: (O, I).
        group_size: columns that share a scale, a multiple of 32; None: a whole row.
        codes: as above.
        scales: as above.
    """

    shape: tuple[int, int]
    group_size: int | None
    codes: Uint8Array
    scales: Uint16Array

    @classmethod
    def from_levels(cls, level_OI: npt.NDArray[np.integer], scale_OG: Float32Array, group_size: int | None) -> Self:
        """Pack signs.

        Args:
            level_OI: -1 or 1, (O, I).
            scale_OG: float32 (O, G), each exactly a bfloat16 in [2**-126, 2**119].
            group_size: columns that share a scale, a multiple of 32; None: a whole row.

        Raises:
            LayoutError: a level or scale is out of range, or the shapes do not fit.
        """
        if level_OI.ndim != 2 or not np.all((level_OI == 1) | (level_OI == -1)):
            raise LayoutError(_FORMAT, "levels that are not binary", allowed="-1 and 1, (O, I)")
        codes = base.pack_codes((level_OI > 0).astype(np.uint8), 1)
        meta = {"shape": list(level_OI.shape), "group_size": group_size}
        return cls.from_arrays(_FORMAT, meta, {"codes": codes, "scales": stored_scales(_FORMAT, scale_OG)})

    @classmethod
    def from_dense(cls, weight_OI: Float32Array, group_size: int | None) -> Self:
        """Pack a matrix whose groups hold -s and +s alone, each with an s of its own.

        Args:
            weight_OI: float32 (O, I).
            group_size: columns that share a scale, a multiple of 32; None: a whole row.

        Raises:
            LayoutError: the matrix is not binary, or a scale is no bfloat16 in range.
        """
        scale_OG = group_scales(_FORMAT, weight_OI, group_size)
        level_OI = (weight_OI > 0).view(np.int8) * np.int8(2) - np.int8(1)
        layout = cls.from_levels(level_OI, scale_OG, group_size)
        for rows in chunks(*layout.shape):
            if np.array_equal(layout._rows(layout.codes[rows], layout.scales[rows]), weight_OI[rows]):
                continue
            raise LayoutError(_FORMAT, "a group with more than one magnitude", allowed="-s and +s")
        return layout

    @property
    def format(self) -> str:
        """binary-v1."""
        return _FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.codes.nbytes + self.scales.nbytes

    def levels_OI(self) -> npt.NDArray[np.int8]:  # noqa: N802 (shape suffix)
        """-1 or 1, int8 (O, I)."""
        return _levels(self.codes, self.shape[1])

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        values_OI = np.empty(self.shape, dtype=np.float32)
        for rows in chunks(*self.shape):
            values_OI[rows] = self._rows(self.codes[rows], self.scales[rows])
        return values_OI

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index = np.asarray(indices)
        flat = index.reshape(-1)
        return self._rows(self.codes[flat], self.scales[flat]).reshape(*index.shape, self.shape[1])

    def _rows(self, codes: Uint8Array, scales: Uint16Array) -> Float32Array:
        width = self.shape[1]
        values: Float32Array = _levels(codes, width) * expand_scales(from_bf16_bits(scales), self.group_size, width)
        return values

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        return {"codes": self.codes, "scales": self.scales}

    def meta(self) -> dict[str, MetaValue]:
        """Shape and group size."""
        return {"shape": list(self.shape), "group_size": self.group_size}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        base.check_format(format, _FORMAT)
        shape = base.read_shape(format, meta, "group_size")
        codes = (base.UINT8, (shape[0], base.code_bytes(shape[1], 1)))
        return {"codes": codes, **base.scales_spec(base.read_group_size(format, meta), shape)}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        shape = base.read_shape(format, meta, "group_size")
        codes = cast(Uint8Array, arrays["codes"])
        base.check_code_padding(format, codes, shape[1], 1)
        base.check_scales(format, arrays)
        return cls(shape, base.read_group_size(format, meta), codes, cast(Uint16Array, arrays["scales"]))


def _levels(codes: Uint8Array, width: int) -> npt.NDArray[np.int8]:
    return (2 * base.unpack_codes(codes, width, 1).astype(np.int8) - 1).astype(np.int8)
