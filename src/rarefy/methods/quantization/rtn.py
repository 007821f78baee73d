"""Round-to-nearest. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.grids import FittedGrid, IntGrid, dequantize, quantize
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, cut, hyperparameter
from rarefy.methods.factors import quantize_factors
from rarefy.methods.grid_search import Search, fit_grid, same_grid

# An embedding is by far the largest matrix of a small model: rows at a time keep the peak of memory low.
_WEIGHTS_AT_ONCE = 4_000_000


@final
@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest point of a grid fitted to its row or group; no data needed.

    References:
        The baseline of Frantar et al., GPTQ, arXiv:2210.17323, section 4; the narrower ranges are those of Choukroun et
        al., Low-bit Quantization of Neural Networks for Efficient Inference, arXiv:1902.06822.
    """

    paper: ClassVar[str] = "arXiv:1902.06822"
    values: IntGrid = hyperparameter(MISSING, "the grid")
    search: Search = hyperparameter(
        "minmax", "range of a group: all of it, or the narrower one with the least squared error"
    )

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing: the weights say it all."""
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Quantize one layer; see `LayerMethod.compress`."""
        if solution.only_factors:
            return quantize_factors(self, self.values, solution, stats, layer)
        weight_OI = solution.weight_OI
        check_finite_weight(weight_OI, layer)
        if solution.grid is not None:
            same_grid(solution.grid, self.values, layer)
            return solution
        value_OI = np.empty_like(weight_OI)
        parts = []
        for start, stop in cut(weight_OI.shape[0], max(1, _WEIGHTS_AT_ONCE // max(1, weight_OI.shape[1]))):
            part = fit_grid(weight_OI[start:stop], self.values, self.search)
            # a pruned zero needs no care: 0 is on every grid
            value_OI[start:stop] = dequantize(quantize(weight_OI[start:stop], part), part)
            parts.append(part)
        fitted = FittedGrid(
            self.values,
            np.concatenate([part.scale_OG for part in parts]),
            np.concatenate([part.zero_point_OG for part in parts]),
        )
        return solution.with_matrix(value_OI, solution.mask_OI, solution.pattern, fitted)
