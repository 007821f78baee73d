"""sum-v1: the sum of two matrices, each in a layout of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import Float32Array
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.binary import Binary
from rarefy.layouts.bitmask_float import BitmaskFloat
from rarefy.layouts.bitmask_int import BitmaskInt
from rarefy.layouts.block_float import BlockFloat
from rarefy.layouts.block_int import BlockInt
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.lookup_table import LookupTable
from rarefy.layouts.low_rank import LowRank
from rarefy.layouts.magnitude import largest_value, require_finite
from rarefy.layouts.nm_float import NMFloat
from rarefy.layouts.nm_int import NMInt
from rarefy.layouts.tapwise import Tapwise
from rarefy.layouts.ternary import Ternary

FORMAT = "sum-v1"

Part = (
    DenseFloat
    | DenseInt
    | BitmaskFloat
    | BitmaskInt
    | NMFloat
    | NMInt
    | BlockFloat
    | BlockInt
    | Ternary
    | Binary
    | LookupTable
    | LowRank
    | Tapwise
)

# every format but that of sums, which may not be parts
PARTS: dict[str, type[Part]] = {
    "dense-f32-v1": DenseFloat,
    "dense-bf16-v1": DenseFloat,
    "dense-int8-v1": DenseInt,
    "dense-int4-v1": DenseInt,
    "dense-int3-v1": DenseInt,
    "dense-int2-v1": DenseInt,
    "bitmask-bf16-v1": BitmaskFloat,
    "bitmask-int8-v1": BitmaskInt,
    "bitmask-int4-v1": BitmaskInt,
    "bitmask-int3-v1": BitmaskInt,
    "bitmask-int2-v1": BitmaskInt,
    "nm-bf16-v1": NMFloat,
    "nm-int8-v1": NMInt,
    "nm-int4-v1": NMInt,
    "nm-int3-v1": NMInt,
    "nm-int2-v1": NMInt,
    "block-bf16-v1": BlockFloat,
    "block-int8-v1": BlockInt,
    "ternary-v1": Ternary,
    "binary-v1": Binary,
    "lut4-v1": LookupTable,
    "lut8-v1": LookupTable,
    "lowrank-bf16-v1": LowRank,
    "lowrank-int8-v1": LowRank,
    "tapwise-bf16-v1": Tapwise,
}


@final
@dataclass(frozen=True, eq=False)
class Sum:
    """W = first + second. A product is that with the first, plus that with the second, one addition of float32 each.

    Bytes (version 1): those of the two parts, in arrays that begin with "0_" and "1_". The largest magnitudes of the
    parts must add up to a float32, so that no entry of W overflows.

    Args:
        first: (O, I).
        second: (O, I).

    Raises:
        LayoutError: the shapes differ, or a part is a sum.
    """

    first: Part
    second: Part

    def __post_init__(self) -> None:
        for part in self.parts:
            if part.format not in PARTS:
                raise LayoutError(FORMAT, f"a part of format {part.format!r}", allowed=", ".join(PARTS))
        if self.first.shape != self.second.shape:
            raise LayoutError(FORMAT, f"parts {self.first.shape} and {self.second.shape}", allowed="the same shape")
        require_finite(FORMAT, sum(_largest_value(part) for part in self.parts))

    @property
    def format(self) -> str:
        """sum-v1."""
        return FORMAT

    @property
    def parts(self) -> tuple[Part, Part]:
        """First and second."""
        return self.first, self.second

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.first.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.first.nbytes + self.second.nbytes

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I)."""
        return self.first.to_dense() + self.second.to_dense()

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        return self.first.rows(indices) + self.second.rows(indices)

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        return {f"{i}_{name}": array for i, part in enumerate(self.parts) for name, array in part.arrays().items()}

    def meta(self) -> dict[str, MetaValue]:
        """Shape, and for each part its format and its metadata except the shape."""
        parts: list[dict[str, object]] = [{"format": part.format, **_without_shape(part.meta())} for part in self.parts]
        return {"shape": list(self.shape), "parts": parts}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        spec: ArraySpec = {}
        for i, (name, part_meta) in enumerate(_part_metas(format, meta)):
            spec |= {f"{i}_{key}": value for key, value in PARTS[name].array_spec(name, part_meta).items()}
        return spec

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        first, second = (
            PARTS[name].from_arrays(name, part_meta, base.without_prefix(arrays, f"{i}_"))
            for i, (name, part_meta) in enumerate(_part_metas(format, meta))
        )
        return cls(first, second)


def _part_metas(format: str, meta: Meta) -> list[tuple[str, Meta]]:
    """Format and whole metadata of each part."""
    if format != FORMAT:
        raise LayoutError("format", repr(format), allowed=FORMAT)
    shape = list(base.read_shape(format, meta, "parts"))
    parts = meta["parts"]
    if not isinstance(parts, list | tuple) or len(parts) != 2 or not all(isinstance(part, Mapping) for part in parts):
        raise LayoutError(format, f"parts {parts!r:.60}", allowed="a list of two objects")
    result: list[tuple[str, Meta]] = []
    for part in parts:
        name = part.get("format")
        if not isinstance(name, str) or name not in PARTS:
            raise LayoutError(format, f"a part of format {name!r:.40}", allowed=", ".join(PARTS))
        if "shape" in part:
            raise LayoutError(format, "a part with a shape", allowed="that of the whole, which stands there once")
        result.append((name, {"shape": shape, **{key: value for key, value in part.items() if key != "format"}}))
    return result


def _without_shape(meta: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
    return {key: value for key, value in meta.items() if key != "shape"}


def _largest_value(part: Part) -> float:
    return part.largest_value() if isinstance(part, LowRank | Tapwise) else largest_value(part.arrays())
