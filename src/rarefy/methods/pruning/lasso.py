"""LASSO and group LASSO on the layer's reconstruction. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Blocks, WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, cut, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import concrete, pattern_of
from rarefy.methods.obs import factorize, sweep
from rarefy.methods.pruning.proximal import penalized
from rarefy.methods.refit import refit


@final
@dataclass(frozen=True)
class Lasso:
    """Choose zeros by a penalty on the layer's reconstruction, then fit the values that are left without it.

    Zeros anywhere cost the sum of magnitudes (LASSO); whole blocks the sum of their norms (group LASSO).

    References:
        Tibshirani, Regression Shrinkage and Selection via the Lasso, J. R. Statist. Soc. B 58 (1996), equation 1; Yuan
        and Lin, Model selection and estimation in regression with grouped variables, J. R. Statist. Soc. B 68 (2006),
        equation 2.4; for layers of networks He et al., Channel Pruning, arXiv:1707.06168, section 3.1.

    Notes:
        The penalty is the one that leaves the sparsity asked for, found along the way. It also shrinks what is kept;
        least squares on the mask takes that back. A layer on a grid stays on it: its values are then rounded by the
        sweep of SparseGPT.
    """

    paper: ClassVar[str] = "arXiv:1707.06168"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero: anywhere, blocks, rows or columns")
    num_steps: int = hyperparameter(60, "proximal steps", ge=1)
    percent_damp: float = hyperparameter(0.01, "added to the diagonal of H, as a fraction of its mean", ge=0, le=1)
    refit_steps: int = hyperparameter(10, "conjugate-gradient steps towards least squares on the final mask", ge=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)
        if isinstance(self.pattern, NM):
            raise PatternError("Lasso.pattern", "N:M", allowed="zeros anywhere, blocks, rows or columns")

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        weight_OI = prunable_weight(solution, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        factor = factorize(gram_II, self.percent_damp, "given", 1, layer)
        unit_I = factor.gram_II.diagonal().sqrt()
        weight = torch.from_numpy(weight_OI)
        wanted = concrete(self.pattern, weight_OI.shape, layer)
        blocks = wanted if isinstance(wanted, Blocks) else Blocks((1, 1), wanted.sparsity)
        scaled_II = factor.gram_II / unit_I / unit_I[:, None]
        value, kept_OI, _ = penalized(weight * unit_I, scaled_II, blocks, solution.mask_OI, self.num_steps)
        pattern = pattern_of(kept_OI, self.pattern, solution.pattern, solution.mask_OI)
        if solution.grid is not None:
            spans = cut(width, 128)
            value_OI, _ = sweep(
                weight_OI, kept_OI, factor, spans=spans, block_size=128, choose=None, fitted=solution.grid
            )
            return solution.with_matrix(value_OI, kept_OI, pattern, solution.grid)
        kept = torch.from_numpy(kept_OI)
        value = refit(weight, value / unit_I * kept, kept, factor.gram_II, self.refit_steps)
        return solution.with_matrix(value.numpy(), kept_OI, pattern, None)
