"""GPTQ: quantization by column-wise Optimal Brain Surgeon. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.grids import IntGrid
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, cut, finite_statistic, hyperparameter
from rarefy.methods.factors import quantize_factors
from rarefy.methods.grid_search import Search, fit_grid, same_grid
from rarefy.methods.obs import Order, factorize, sweep


@final
@dataclass(frozen=True)
class GPTQ:
    """Round the columns one after another, each time moving the columns that are still free to make up for the error.

    Zeros of an earlier step stay zeros: what the compensation puts on them is an error like any other, and passed on.

    References:
        Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
        arXiv:2210.17323, equation 2 and algorithm 1; activation order and static groups from the authors' code.

    Notes:
        Deviations: the columns are taken in order of falling activation ("activation order"); the grids are fitted
        before the sweep and belong to columns where they stand in the layer ("static groups"), so that no index of
        columns need be stored; the range of a group is not simply its minimum and maximum, but the one with the least
        sum of the losses (equation 2) that rounding each of its weights alone would cause.
    """

    paper: ClassVar[str] = "arXiv:2210.17323"
    values: IntGrid = hyperparameter(MISSING, "the grid")
    percent_damp: float = hyperparameter(0.01, "added to the diagonal of H, as a fraction of its mean", ge=0, le=1)
    order: Order = hyperparameter("activation", "which columns come first")
    block_size: int = hyperparameter(128, "columns between two updates of all the columns that follow", ge=1)
    search: Search = hyperparameter("error", "range of a group: all of it, or the narrower one with the least OBS loss")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Quantize one layer; see `LayerMethod.compress`."""
        weight_OI = solution.weight_OI
        check_finite_weight(weight_OI, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        if solution.only_factors:
            return quantize_factors(self, self.values, solution, stats, layer)
        if solution.grid is not None:
            same_grid(solution.grid, self.values, layer)
            return solution
        factor = factorize(gram_II, self.percent_damp, self.order, 1, layer)
        fitted = fit_grid(weight_OI, self.values, self.search, factor.loss_I())
        value_OI, _ = sweep(
            weight_OI,
            solution.mask_OI,
            factor,
            spans=cut(width, self.block_size),
            block_size=self.block_size,
            choose=None,
            fitted=fitted,
        )
        return solution.with_matrix(value_OI, solution.mask_OI, solution.pattern, fitted)
