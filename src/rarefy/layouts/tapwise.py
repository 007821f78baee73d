"""tapwise-bf16-v1: factors of a convolution's weight. Suffixes: O out, I in, G runs, R and A ranks."""

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
from rarefy.layouts.low_rank import LowRank
from rarefy.layouts.magnitude import largest_value, require_finite

FORMAT = "tapwise-bf16-v1"
_PART = "dense-bf16-v1"


@final
@dataclass(frozen=True, eq=False)
class Tapwise:
    """W = left (I_G (x) right): the columns in G runs of equal length, each of which meets the same right factor.

    A product is one with `right` for each run, and then one with `left` of what comes out of all runs; W is never
    computed. Where `left` is a low-rank pair, its two factors are called left and core.

    Bytes (version 1): those of two or three matrices, each as in dense-bf16-v1.
        left_values: (O, A) with a core, (O, G R) without.
        core_values: (A, G R); absent where outer_rank is null.
        right_values: (R, I / G).
    The largest magnitudes of the factors times A and R must be a float32, so that no entry of W overflows.

    Args:
        left: (O, G R).
        right: (R, I / G).
        num_runs: G, at least 1.

    Raises:
        LayoutError: the factors do not fit each other.
    """

    left: DenseFloat | LowRank
    right: DenseFloat
    num_runs: int

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        formats = {_PART, "lowrank-bf16-v1"}
        if left.format not in formats or right.format != _PART:
            raise LayoutError(FORMAT, f"factors {left.format} and {right.format}", allowed=" or ".join(sorted(formats)))
        if self.num_runs < 1 or left.shape[1] != self.num_runs * right.shape[0]:
            found = f"factors {left.shape} and {right.shape} of {self.num_runs} runs"
            raise LayoutError(FORMAT, found, allowed="(O, G R) and (R, I / G)")
        require_finite(FORMAT, self.largest_value())

    @property
    def format(self) -> str:
        """tapwise-bf16-v1."""
        return FORMAT

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left.shape[0], self.num_runs * self.right.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.left.nbytes + self.right.nbytes

    def to_dense(self) -> Float32Array:
        """The matrix as float32 (O, I): sums in float64, rounded once."""
        return self._times_right(self._left(np.arange(self.shape[0])))

    def rows(self, indices: npt.ArrayLike) -> Float32Array:
        """Rows of the matrix: integer indices of shape S give float32 (*S, I)."""
        index = np.asarray(indices)
        return self._times_right(self._left(index.reshape(-1))).reshape(*index.shape, self.shape[1])

    def largest_value(self) -> float:
        """A bound on the magnitudes of W."""
        left = self.left.largest_value() if isinstance(self.left, LowRank) else largest_value(self.left.arrays())
        return left * self.right.shape[0] * largest_value(self.right.arrays())

    def arrays(self) -> dict[str, Array]:
        """The arrays to store, by name."""
        if isinstance(self.left, LowRank):
            left = {"left_values": self.left.left.arrays()["values"], "core_values": self.left.right.arrays()["values"]}
        else:
            left = {"left_values": self.left.arrays()["values"]}
        return left | {"right_values": self.right.arrays()["values"]}

    def meta(self) -> dict[str, MetaValue]:
        """Shape, number of runs, and the ranks."""
        outer = self.left.rank if isinstance(self.left, LowRank) else None
        return {
            "shape": list(self.shape),
            "num_runs": self.num_runs,
            "inner_rank": self.right.shape[0],
            "outer_rank": outer,
        }

    @classmethod
    def array_spec(cls, format: str, meta: Meta) -> ArraySpec:
        """See Layout.array_spec."""
        base.check_format(format, FORMAT)
        rows, width = base.read_shape(format, meta, "num_runs", "inner_rank", "outer_rank")
        num_runs = base.read_integer(format, "num_runs", meta["num_runs"], 1, base.MAX_DIMENSION)
        inner = base.read_integer(format, "inner_rank", meta["inner_rank"], 0, base.MAX_DIMENSION)
        if width % num_runs:
            raise LayoutError(format, f"{num_runs} runs of {width} columns", allowed="runs of equal length")
        shapes = {"left_values": (rows, num_runs * inner), "right_values": (inner, width // num_runs)}
        if meta["outer_rank"] is not None:
            outer = base.read_integer(format, "outer_rank", meta["outer_rank"], 0, base.MAX_DIMENSION)
            shapes |= {"left_values": (rows, outer), "core_values": (outer, num_runs * inner)}
        return {name: (base.UINT16, shape) for name, shape in shapes.items()}

    @classmethod
    def from_arrays(cls, format: str, meta: Meta, arrays: Mapping[str, Array]) -> Self:
        """See Layout.from_arrays."""
        arrays = base.check_arrays(format, cls.array_spec(format, meta), arrays)
        parts = {
            name.removesuffix("_values"): DenseFloat.from_arrays(_PART, {"shape": list(array.shape)}, {"values": array})
            for name, array in arrays.items()
        }
        left: DenseFloat | LowRank = parts["left"]
        if "core" in parts:
            left = LowRank(parts["left"], parts["core"])
        num_runs = base.read_integer(format, "num_runs", meta["num_runs"], 1, base.MAX_DIMENSION)
        return cls(left, parts["right"], num_runs)

    def _left(self, index_N: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
        """Rows of the left factor, float64 (N, G R)."""
        if not isinstance(self.left, LowRank):
            return self.left.rows(index_N).astype(np.float64)
        core = self.left.right.to_dense().astype(np.float64)
        product: npt.NDArray[np.float64] = self.left.left.rows(index_N).astype(np.float64) @ core
        return product

    def _times_right(self, left_NM: npt.NDArray[np.float64]) -> Float32Array:
        rank = self.right.shape[0]
        product = left_NM.reshape(len(left_NM), self.num_runs, rank) @ self.right.to_dense().astype(np.float64)
        return product.reshape(len(left_NM), self.shape[1]).astype(np.float32)
