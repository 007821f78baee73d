"""dense-bf16-v1 and dense-f32-v1: every entry of the matrix as a float."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, cast, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import Float32Array, Uint16Array, from_bf16_bits
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue


@final
@dataclass(frozen=True, eq=False)
class DenseFloat:
    """Row-major floats.

    Bytes (version 1):
        values: dense-bf16-v1: uint16 (O, I), each the upper 16 bits of a float32. dense-f32-v1: float32 (O, I).
            Little-endian, no padding, finite (NaN and infinity are reserved).

    Args:
        values: uint16 or float32, (O, I).
    """

    values: Uint16Array | Float32Array

    @property
    def format(self) -> str:
        """dense-bf16-v1 or dense-f32-v1."""
        return "dense-f32-v1" if self.values.dtype == np.float32 else "dense-bf16-v1"

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, width = self.values.shape
        return rows, width

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.values.nbytes

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return _widen(self.values).copy()

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        return _widen(self.values[np.asarray(indices)])

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        return {"values": self.values}

    def meta(self) -> dict[str, MetaValue]:
        """Shape."""
        return {"shape": list(self.shape)}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        base.check_format(format, "dense-bf16-v1", "dense-f32-v1")
        shape = base.read_shape(format, meta)
        return {"values": (base.FLOAT32 if format == "dense-f32-v1" else base.UINT16, shape)}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        values = base.check_arrays(format, cls.array_spec(format, meta), arrays)["values"]
        if format == "dense-bf16-v1":
            base.check_finite_bf16(format, cast(Uint16Array, values))
        elif not np.all(np.isfinite(cast(Float32Array, values))):
            raise LayoutError(f"{format} values", "NaN or infinity", allowed="finite numbers")
        return cls(cast("Uint16Array | Float32Array", values))


def _widen(values: Uint16Array | Float32Array) -> Float32Array:
    if values.dtype == np.float32:
        return cast(Float32Array, values)
    return from_bf16_bits(cast(Uint16Array, values))
