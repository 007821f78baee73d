"""Least squares on a fixed mask. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, cut, finite_statistic, hyperparameter
from rarefy.methods.obs import Order, factorize, sweep
from rarefy.methods.refit import refit


@final
@dataclass(frozen=True)
class Refit:
    """Give the entries that are left the values with the least error in the layer's outputs; zeros stay where they are.

    It follows a method that makes zeros, and aims at the weights as they were before all steps: after Wanda it makes up
    for what Wanda dropped. Beside factors it fits what those do not hold. A layer without zeros stays as it is.

    References:
        Meng et al., ALPS, arXiv:2406.07831, section 3.2, equation 8: for every row, H restricted to the kept entries.

    Notes:
        Conjugate gradients for all rows at once, as many steps as are asked for; those of the linear systems would take
        about as long as the 50 by default, which leave no more than the rounding of float32. On a grid, the values are
        chosen on it by the sweep of GPTQ.
    """

    paper: ClassVar[str] = "arXiv:2406.07831"
    num_steps: int = hyperparameter(50, "of conjugate gradients", ge=1)
    percent_damp: float = hyperparameter(0.01, "added to the diagonal of H, as a fraction of its mean", ge=0, le=1)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Fit one layer; see `LayerMethod.compress`."""
        weight_OI, mask_OI = solution.weight_OI, solution.mask_OI
        check_finite_weight(weight_OI, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        if mask_OI is None or solution.only_factors:
            return solution
        target_OI = solution.target_OI
        check_finite_weight(target_OI, layer)
        order: Order = "given" if solution.grid is None else "activation"
        factor = factorize(gram_II, self.percent_damp, order, 1, layer)
        if solution.grid is not None:
            spans = cut(width, 128)
            value_OI, _ = sweep(
                target_OI, mask_OI, factor, spans=spans, block_size=128, choose=None, fitted=solution.grid
            )
            return solution.with_matrix(value_OI, mask_OI, solution.pattern, solution.grid)
        target, start, kept = (torch.from_numpy(array) for array in (target_OI, weight_OI, mask_OI))
        value = refit(target, start, kept, factor.gram_II, self.num_steps)
        return solution.with_matrix(value.numpy(), mask_OI, solution.pattern, None)
