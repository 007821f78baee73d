"""Factors of a convolution's weight: one small matrix meets each run of taps, another what comes out of all of them.

Shape suffixes: O out, I in, G runs of columns, C columns of a run, R rank inside, A rank outside, M = G R.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import FittedGrid, Float32Array


@final
@dataclass(frozen=True, eq=False)
class TapFactors:
    """V = left core (I_G (x) right): the columns in G runs of equal length, each of which meets the same right factor.

    A kernel of taps is such a matrix in two ways. With a run for every tap the right factor is a 1 x 1 convolution, the
    core has all taps, and the left factor is 1 x 1 again: Tucker-2. With a run for every row of taps, and without a
    core, the right factor is a convolution along the rows and the left one along the columns: spatial factors.

    Args:
        left_OA: float32 (O, A); without a core (O, M).
        core_AM: float32 (A, M), or None.
        right_RC: float32 (R, C).
        num_runs: G.

    Raises:
        LayoutError: dtypes or shapes disagree.
    """

    left_OA: Float32Array
    core_AM: Float32Array | None
    right_RC: Float32Array
    num_runs: int

    def __post_init__(self) -> None:
        parts = self.parts
        if any(part.dtype != np.float32 or part.ndim != 2 for part in parts):
            raise LayoutError("factors", ", ".join(f"{part.dtype} {part.shape}" for part in parts), allowed="float32")
        widths = [part.shape[1] for part in parts[:-1]]
        heights = [part.shape[0] for part in parts[1:-1]] + [self.num_runs * self.right_RC.shape[0]]
        if self.num_runs < 1 or widths != heights:
            shapes = ", ".join(str(part.shape) for part in parts)
            raise LayoutError(
                "factors", f"shapes {shapes} for {self.num_runs} runs", allowed="(O, A), (A, G R), (R, C)"
            )

    @property
    def parts(self) -> tuple[Float32Array, ...]:
        """The factors from left to right."""
        return (self.left_OA, self.right_RC) if self.core_AM is None else (self.left_OA, self.core_AM, self.right_RC)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left_OA.shape[0], self.num_runs * self.right_RC.shape[1]

    @property
    def rank(self) -> int:
        """R."""
        return int(self.right_RC.shape[0])

    @property
    def left_grid(self) -> FittedGrid | None:
        """None: these factors are stored as floats."""
        return None

    @cached_property
    def product_OI(self) -> Float32Array:  # noqa: N802 (shape suffix)
        """V, float32 (O, I): sums in float64, rounded once, as the layout's `to_dense`."""
        left_OM = self.left_OA.astype(np.float64)
        if self.core_AM is not None:
            left_OM = left_OM @ self.core_AM.astype(np.float64)
        left_OGR = left_OM.reshape(len(left_OM), self.num_runs, self.rank)
        product_OGC = left_OGR @ self.right_RC.astype(np.float64)
        return product_OGC.reshape(self.shape).astype(np.float32)

    def check(self) -> None:
        """Check what costs a pass over the factors; see Solution.check."""
        if not all(np.all(np.isfinite(part)) for part in self.parts):
            raise NonFiniteError("factors", "a factor that is NaN or infinite")
