"""What a compression method hands to the next one: a matrix, its zero pattern and its value grid, and its factors."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import FittedGrid, Float32Array, IntGrid, chunks, dequantize, quantize
from rarefy.core.patterns import NM, Pattern, Unstructured
from rarefy.core.tap_factors import TapFactors


@final
@dataclass(frozen=True, eq=False)
class Factors:
    """A matrix of low rank, left @ right.

    Args:
        left_OK: float32 (O, K).
        right_KI: float32 (K, I).
        left_grid: the grid that the left factor lies on; None: any float.
        right_grid: the same of the right one; both factors have a grid of one specification, or none has.

    Raises:
        LayoutError: dtypes, shapes or grids disagree.
    """

    left_OK: Float32Array
    right_KI: Float32Array
    left_grid: FittedGrid | None = None
    right_grid: FittedGrid | None = None

    def __post_init__(self) -> None:
        left, right = self.left_OK, self.right_KI
        if left.dtype != np.float32 or right.dtype != np.float32 or left.ndim != 2 or right.ndim != 2:
            raise LayoutError(
                "factors", f"{left.dtype} {left.shape} and {right.dtype} {right.shape}", allowed="float32"
            )
        if left.shape[1] != right.shape[0]:
            raise LayoutError("factors", f"shapes {left.shape} and {right.shape}", allowed="(O, K) and (K, I)")
        grids = [None if fitted is None else fitted.grid for fitted in (self.left_grid, self.right_grid)]
        if grids[0] != grids[1]:
            raise LayoutError("factors", f"grids {grids[0]} and {grids[1]}", allowed="the same for both")
        for weight, fitted in self._pairs():
            _check_scales(weight, fitted)

    @property
    def parts(self) -> tuple[Float32Array, ...]:
        """The factors from left to right."""
        return self.left_OK, self.right_KI

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left_OK.shape[0], self.right_KI.shape[1]

    @property
    def rank(self) -> int:
        """K."""
        return int(self.left_OK.shape[1])

    @cached_property
    def product_OI(self) -> Float32Array:  # noqa: N802 (shape suffix)
        """left @ right, float32 (O, I): sums in float64, rounded once, as the layout's `to_dense`."""
        product = self.left_OK.astype(np.float64) @ self.right_KI.astype(np.float64)
        return product.astype(np.float32)

    def check(self) -> None:
        """Check the invariants that cost a pass over the factors; see Solution.check."""
        for weight, fitted in self._pairs():
            Solution(weight, None, None, fitted).check()

    def _pairs(self) -> tuple[tuple[Float32Array, FittedGrid | None], ...]:
        return (self.left_OK, self.left_grid), (self.right_KI, self.right_grid)


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """A cheap matrix V in place of a weight W, with what makes it cheap: V = weight_OI + left @ right.

    A later method starts from it and keeps it: zeros of `weight_OI` stay zeros, a grid stays a grid, factors stay
    factors of that rank. Where there are no factors, `weight_OI` is V. Where everything is in the factors, `weight_OI`
    is zero and its mask is False everywhere.

    Args:
        weight_OI: float32 (O, I); 0 where the mask is False; on the grid where there is one.
        mask_OI: bool (O, I), True where the entry is kept (stored; its value may still be 0); None: all are kept.
        pattern: the pattern that the mask obeys; None without a mask.
        grid: the grid that every kept weight lies on; None: any float.
        factors: the part of V that has low rank; None: there is none.
        original_OI: float32 (O, I), W as the first step found it; None where nobody knows it any more.
        bias_O: float32 (O,), what is to be added to the outputs of V; None: nothing.
        taps: of a convolution the size of its kernel along each axis: I is prod(taps) runs of one column a channel.

    Raises:
        LayoutError: dtypes or shapes disagree.
    """

    weight_OI: Float32Array
    mask_OI: npt.NDArray[np.bool_] | None
    pattern: Pattern | None
    grid: FittedGrid | None
    factors: Factors | TapFactors | None = None
    original_OI: Float32Array | None = None
    taps: tuple[int, ...] = ()
    bias_O: Float32Array | None = None

    def __post_init__(self) -> None:
        weight, mask = self.weight_OI, self.mask_OI
        if weight.ndim != 2 or weight.dtype != np.float32:
            raise LayoutError("solution", f"weight {weight.dtype} {weight.shape}", allowed="float32 (O, I)")
        if (mask is None) != (self.pattern is None):
            raise LayoutError("solution", "a mask without a pattern, or the reverse", allowed="both or none")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != weight.shape):
            raise LayoutError("solution", f"mask {mask.dtype} {mask.shape}", allowed=f"bool {weight.shape}")
        _check_scales(weight, self.grid)
        if self.factors is not None and self.factors.shape != weight.shape:
            raise LayoutError("solution", f"factors of a matrix {self.factors.shape}", allowed=str(weight.shape))
        if self.bias_O is not None and (self.bias_O.shape != weight.shape[:1] or self.bias_O.dtype != np.float32):
            found = f"bias {self.bias_O.dtype} {self.bias_O.shape}"
            raise LayoutError("solution", found, allowed=f"float32 {weight.shape[:1]}")
        original = self.original_OI
        if original is not None and (original.shape != weight.shape or original.dtype != np.float32):
            raise LayoutError(
                "solution", f"original {original.dtype} {original.shape}", allowed=f"float32 {weight.shape}"
            )

    @classmethod
    def dense(cls, weight_OI: Float32Array, taps: tuple[int, ...] = ()) -> Self:
        """The uncompressed start: every entry kept, any float."""
        return cls(weight_OI, None, None, None, original_OI=weight_OI, taps=taps)

    @classmethod
    def low_rank(cls, factors: Factors | TapFactors, original_OI: Float32Array | None = None) -> Self:
        """Factors and nothing else."""
        nothing = np.zeros(factors.shape, dtype=np.bool_)
        return cls(np.zeros(factors.shape, dtype=np.float32), nothing, Unstructured(1.0), None, factors, original_OI)

    def with_matrix(
        self,
        weight_OI: Float32Array,
        mask_OI: npt.NDArray[np.bool_] | None,
        pattern: Pattern | None,
        grid: FittedGrid | None,
    ) -> Self:
        """The solution with another matrix beside its factors, as every method that knows nothing of factors makes."""
        return dataclasses.replace(self, weight_OI=weight_OI, mask_OI=mask_OI, pattern=pattern, grid=grid)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, width = self.weight_OI.shape
        return rows, width

    @property
    def value_OI(self) -> Float32Array:  # noqa: N802 (shape suffix)
        """V, float32 (O, I)."""
        return self.weight_OI if self.factors is None else self.weight_OI + self.factors.product_OI

    @property
    def target_OI(self) -> Float32Array:  # noqa: N802 (shape suffix)
        """What `weight_OI` stands for: W without the factors' part; `weight_OI` itself where W is not known."""
        if self.original_OI is None:
            return self.weight_OI
        return self.original_OI if self.factors is None else self.original_OI - self.factors.product_OI

    @cached_property
    def only_factors(self) -> bool:
        """Whether everything is in the factors."""
        return self.factors is not None and self.mask_OI is not None and not self.mask_OI.any()

    @property
    def value_grid(self) -> IntGrid | None:
        """The grid that the matrix is on, or the factors where there is nothing else."""
        fitted = self.factors.left_grid if self.factors is not None and self.only_factors else self.grid
        return None if fitted is None else fitted.grid

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in V; factors leave none."""
        return 0.0 if self.mask_OI is None or self.factors is not None else 1.0 - float(np.mean(self.mask_OI))

    def check(self) -> None:
        """Check the invariants that cost a pass over the weights.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            LayoutError: a pruned weight is not zero, a weight is off the grid, or a group keeps more than its pattern.
        """
        if self.factors is not None:
            self.factors.check()
        for rows in chunks(*self.shape):
            self._check_rows(rows)

    def _check_rows(self, rows: slice) -> None:
        weight_OI = self.weight_OI[rows]
        if not np.all(np.isfinite(weight_OI)):
            raise NonFiniteError("solution", "a weight that is NaN or infinite")
        if self.mask_OI is not None:
            mask_OI = self.mask_OI[rows]
            if np.any((weight_OI != 0) & ~mask_OI):
                raise LayoutError("solution", "a pruned weight that is not zero")
            if isinstance(self.pattern, NM) and mask_OI.size:
                kept_OG = self.pattern.count_kept_OG(mask_OI)
                if np.any(kept_OG > self.pattern.keep_counts_G(self.shape[1])):
                    raise LayoutError("solution", f"a group that keeps more than its pattern {self.pattern} allows")
        if self.grid is not None:
            # a pruned zero needs no special case: 0 is on every grid
            grid = FittedGrid(self.grid.grid, self.grid.scale_OG[rows], self.grid.zero_point_OG[rows])
            if not np.array_equal(dequantize(quantize(weight_OI, grid), grid), weight_OI):
                raise LayoutError("solution", "a weight that is not on its grid", hint="round with core.grids")


def cut_rows(solution: Solution, num_parts: int) -> list[Solution]:
    """The solutions of parts of the rows, of equal size, one below the other: what `stack` puts together again.

    Raises:
        LayoutError: it has factors: those of a part of the rows are no factors of the whole.
    """
    if solution.factors is not None:
        raise LayoutError("solution", "factors of a part of the rows", allowed="factors of a layer without groups")
    size = solution.shape[0] // num_parts
    grid, mask_OI, original_OI, bias_O = solution.grid, solution.mask_OI, solution.original_OI, solution.bias_O
    return [
        dataclasses.replace(
            solution,
            weight_OI=solution.weight_OI[rows],
            mask_OI=None if mask_OI is None else mask_OI[rows],
            grid=None if grid is None else FittedGrid(grid.grid, grid.scale_OG[rows], grid.zero_point_OG[rows]),
            original_OI=None if original_OI is None else original_OI[rows],
            bias_O=None if bias_O is None else bias_O[rows],
        )
        for rows in (slice(part * size, (part + 1) * size) for part in range(num_parts))
    ]


def stack(parts: Sequence[Solution]) -> Solution:
    """The solutions of parts of the rows, one below the other, as one; all must be of one pattern and grid.

    Args:
        parts: at least one.

    Raises:
        LayoutError: several, and one has factors: a pair of factors per part is no pair of the whole.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.factors is not None for part in parts):
        raise LayoutError("solution", "factors of a part of the rows", allowed="factors of a layer without groups")
    masks = [part.mask_OI for part in parts if part.mask_OI is not None]
    grids = [part.grid for part in parts if part.grid is not None]
    grid = None
    if first.grid is not None:
        scale_OG = np.concatenate([each.scale_OG for each in grids])
        grid = FittedGrid(first.grid.grid, scale_OG, np.concatenate([each.zero_point_OG for each in grids]))
    biases = [part.bias_O for part in parts if part.bias_O is not None]
    originals = [part.original_OI for part in parts if part.original_OI is not None]
    return Solution(
        np.concatenate([part.weight_OI for part in parts]),
        np.concatenate(masks) if masks else None,
        first.pattern,
        grid,
        original_OI=np.concatenate(originals) if originals else None,
        taps=first.taps,
        bias_O=np.concatenate(biases) if biases else None,
    )


def _check_scales(weight: Float32Array, fitted: FittedGrid | None) -> None:
    if fitted is not None:
        expected = (weight.shape[0], fitted.grid.num_groups(weight.shape[1]))
        if fitted.scale_OG.shape != expected:
            raise LayoutError("solution", f"scales {fitted.scale_OG.shape}", allowed=str(expected))
