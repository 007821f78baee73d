"""lowrank-bf16-v1 and lowrank-int8-v1: the product of a tall and a wide matrix. Suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError
from rarefy.core.grids import Float32Array
from rarefy.layouts import base
from rarefy.layouts.base import Array, ArraySpec, Meta, MetaValue
from rarefy.layouts.dense_float import DenseFloat
from rarefy.layouts.dense_int import DenseInt
from rarefy.layouts.magnitude import largest_value, require_finite

# name of each factor's own format
FACTORS: dict[str, tuple[str, type[DenseFloat] | type[DenseInt]]] = {
    "lowrank-bf16-v1": ("dense-bf16-v1", DenseFloat),
    "lowrank-int8-v1": ("dense-int8-v1", DenseInt),
}


@final
@dataclass(frozen=True, eq=False)
class LowRank:
    """W = left @ right, which is never computed: a product with W is one with `right` and then one with `left`.

    Bytes (version 1): those of the two factors, of the same format, in arrays that begin with "left_" and "right_".
        lowrank-bf16-v1: left_values (O, K) and right_values (K, I) as in dense-bf16-v1.
        lowrank-int8-v1: left_codes, left_scales and left_zero_points of a matrix (O, K), and the same of one (K, I), as
            in dense-int8-v1; both have the same group_size and symmetric.
    The largest magnitudes of the factors times K must be a float32, so that no entry of W overflows.

    Args:
        left: (O, K).
        right: (K, I).

    Raises:
        LayoutError: the factors do not fit each other.
    """

    left: DenseFloat | DenseInt
    right: DenseFloat | DenseInt

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.shape[1] != right.shape[0]:
            raise LayoutError("lowrank", f"factors {left.shape} and {right.shape}", allowed="(O, K) and (K, I)")
        grids = [factor.grid for factor in (left, right) if isinstance(factor, DenseInt)]
        if left.format != right.format or left.format not in {name for name, _ in FACTORS.values()}:
            raise LayoutError(
                "lowrank", f"factors {left.format} and {right.format}", allowed="two of bf16, two of int8"
            )
        if grids and grids[0] != grids[1]:
            raise LayoutError("lowrank", f"grids {grids[0]} and {grids[1]}", allowed="the same for both")
        require_finite(self.format, self.largest_value())

    @property
    def format(self) -> str:
        """lowrank-bf16-v1 or lowrank-int8-v1."""
        return next(name for name, (factor, _) in FACTORS.items() if factor == self.left.format)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def rank(self) -> int:
        """K."""
        return self.left.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.left.nbytes + self.right.nbytes

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I): sums in float64, rounded once."""
        product = self.left.to_dense().astype(np.float64) @ self.right.to_dense().astype(np.float64)
        return product.astype(np.float32)

    def largest_value(self) -> float:
        """A bound on the magnitudes of W."""
        return self.rank * largest_value(self.left.arrays()) * largest_value(self.right.arrays())

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix (an embedding look-up): integer indices of shape S give float32 (*S, I)."""
        left_NK = self.left.rows(indices).astype(np.float64)
        return (left_NK @ self.right.to_dense().astype(np.float64)).astype(np.float32)

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        left = {f"left_{name}": array for name, array in self.left.arrays().items()}
        return left | {f"right_{name}": array for name, array in self.right.arrays().items()}

    def meta(self) -> dict[str, MetaValue]:
        """Shape, rank, and the grid of int8 factors."""
        grid = {key: value for key, value in self.left.meta().items() if key != "shape"}
        return {"shape": list(self.shape), "rank": self.rank, **grid}

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        spec: ArraySpec = {}
        for side, factor_meta in _factor_metas(format, meta).items():
            name, factor = FACTORS[format]
            spec |= {f"{side}_{key}": value for key, value in factor.array_spec(name, factor_meta).items()}
        return spec

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        name, factor = FACTORS[format]
        sides = {
            side: factor.from_arrays(name, factor_meta, base.without_prefix(arrays, f"{side}_"))
            for side, factor_meta in _factor_metas(format, meta).items()
        }
        return cls(sides["left"], sides["right"])


def _factor_metas(format: str, meta: Meta) -> dict[str, Meta]:
    if format not in FACTORS:
        raise LayoutError("format", repr(format), allowed=", ".join(FACTORS))
    grid_keys = ("group_size", "symmetric") if FACTORS[format][1] is DenseInt else ()
    shape = base.read_shape(format, meta, "rank", *grid_keys)
    rank = base.read_integer(format, "rank", meta["rank"], 0, base.MAX_DIMENSION)
    grid = {key: meta[key] for key in grid_keys}
    return {"left": {"shape": [shape[0], rank], **grid}, "right": {"shape": [rank, shape[1]], **grid}}
