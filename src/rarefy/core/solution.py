"""What a compression method hands to the next one: a matrix, its zero pattern and its value grid."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import numpy.typing as npt

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import FittedGrid, Float32Array, chunks, dequantize, quantize
from rarefy.core.patterns import NM, Pattern


@final
@dataclass(frozen=True, eq=False)
class Solution:
    """A cheap matrix V in place of a weight W, with what makes it cheap.

    A later method starts from it and keeps it: zeros stay zeros, a grid stays a grid.

    Args:
        weight_OI: float32 (O, I), the matrix V; 0 where the mask is False; on the grid where there is one.
        mask_OI: bool (O, I), True where the entry is kept (stored; its value may still be 0); None: all are kept.
        pattern: the pattern that the mask obeys; None without a mask.
        grid: the grid that every kept weight lies on; None: any float.

    Raises:
        LayoutError: dtypes or shapes disagree.
    """

    weight_OI: Float32Array
    mask_OI: npt.NDArray[np.bool_] | None
    pattern: Pattern | None
    grid: FittedGrid | None

    def __post_init__(self) -> None:
        weight, mask = self.weight_OI, self.mask_OI
        if weight.ndim != 2 or weight.dtype != np.float32:
            raise LayoutError("solution", f"weight {weight.dtype} {weight.shape}", allowed="float32 (O, I)")
        if (mask is None) != (self.pattern is None):
            raise LayoutError("solution", "a mask without a pattern, or the reverse", allowed="both or none")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != weight.shape):
            raise LayoutError("solution", f"mask {mask.dtype} {mask.shape}", allowed=f"bool {weight.shape}")
        if self.grid is not None:
            expected = (weight.shape[0], self.grid.grid.num_groups(weight.shape[1]))
            if self.grid.scale_OG.shape != expected:
                raise LayoutError("solution", f"scales {self.grid.scale_OG.shape}", allowed=str(expected))

    @classmethod
    def dense(cls, weight_OI: Float32Array) -> Self:
        """The uncompressed start: every entry kept, any float."""
        return cls(weight_OI, None, None, None)

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        rows, width = self.weight_OI.shape
        return rows, width

    def check(self) -> None:
        """Check the invariants that cost a pass over the weights.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            LayoutError: a pruned weight is not zero, a weight is off the grid, or a group keeps more than its pattern.
        """
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


def stack(parts: Sequence[Solution]) -> Solution:
    """The solutions of parts of the rows, one below the other, as one; all must be of one pattern and grid.

    Args:
        parts: at least one.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    masks = [part.mask_OI for part in parts if part.mask_OI is not None]
    grids = [part.grid for part in parts if part.grid is not None]
    grid = None
    if first.grid is not None:
        scale_OG = np.concatenate([each.scale_OG for each in grids])
        grid = FittedGrid(first.grid.grid, scale_OG, np.concatenate([each.zero_point_OG for each in grids]))
    return Solution(
        np.concatenate([part.weight_OI for part in parts]),
        np.concatenate(masks) if masks else None,
        first.pattern,
        grid,
    )
