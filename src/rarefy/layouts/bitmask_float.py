"""bitmask-bf16-v1: one bit per entry says whether it is stored, and the stored ones follow each other as bfloat16."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.grids import Float32Array, Uint8Array, Uint16Array, from_bf16_bits
from rarefy.layouts import base, row_lookup
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue

FORMAT = "bitmask-bf16-v1"


@final
@dataclass(frozen=True, eq=False)
class BitmaskFloat:
    """An unstructured sparse matrix of bfloat16.

    Bytes (version 1), all little-endian:
        mask: uint8 (O, ceil(I / 8)); column i of a row is bit i % 8 (least significant first) of byte i // 8; 1 means
            stored; bits beyond the last column are 0.
        values: uint16 (num_values,), the stored entries in row-major order without row padding, each the upper 16 bits
            of a float32; finite. A stored entry may be zero. num_values is the number of 1 bits.

    Args:
        shape: (O, I).
        mask: as above.
        values: as above.
    """

    shape: tuple[int, int]
    mask: Uint8Array
    values: Uint16Array

    @property
    def format(self) -> str:
        """bitmask-bf16-v1."""
        return FORMAT

    @property
    def num_values(self) -> int:
        """Number of stored entries."""
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.mask.nbytes + self.values.nbytes

    def mask_OI(self) -> npt.NDArray[np.bool_]:  # noqa: N802 (shape suffix)
        """True where an entry is stored, bool (O, I)."""
        return base.unpack_mask(self.mask, self.shape[1])

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        dense = np.zeros(self.shape, dtype=np.float32)
        dense[self.mask_OI()] = from_bf16_bits(self.values)
        return dense

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        index_N, shape = row_lookup.flat(indices)
        mask_NI = base.unpack_mask(self.mask[index_N], self.shape[1])
        place_S = row_lookup.row_places(mask_NI, self._starts[index_N])
        return row_lookup.float_rows(mask_NI, self.values[place_S]).reshape(*shape, self.shape[1])

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        return {"mask": self.mask, "values": self.values}

    def meta(self) -> dict[str, MetaValue]:
        """Shape and number of stored entries."""
        return {"shape": list(self.shape), "num_values": self.num_values}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        base.check_format(format, FORMAT)
        shape = base.read_shape(format, meta, "num_values")
        return {**base.mask_spec(shape), "values": (base.UINT16, (base.read_num_values(format, meta, shape),))}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        shape = base.read_shape(format, meta, "num_values")
        mask, values = cast(Uint8Array, arrays["mask"]), cast(Uint16Array, arrays["values"])
        base.check_mask(format, mask, shape[1])
        base.check_popcount(format, mask, values.shape[0])
        base.check_finite_bf16(format, values)
        return cls(shape, mask, values)

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return row_lookup.row_starts(self.mask)
