"""ALPS: one-shot pruning by ADMM. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic, bfloat16_products
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, cut, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import BoolArray, pattern_of, select
from rarefy.methods.obs import factorize, sweep
from rarefy.methods.refit import refit

# Iterations between two looks at how much the support still changes (section 3.1 and the authors' code).
_EVERY = 3
# Where the support changes by more than this share of the kept entries, rho grows by this factor (section 3.1, "rho
# update scheme"); where it does not change at all, it is final.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@final
@dataclass(frozen=True)
class ALPS:
    """Choose zeros for the whole layer at once by ADMM on its reconstruction, then fit the values that are left.

    Zeros move between columns and rows for as long as that lowers the error, where SparseGPT fixes those of a column
    before it has seen the next.

    References:
        Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models,
        arXiv:2406.07831, equation 1 (the problem), 3 (the iterations), algorithm 2 (values on the final support).

    Notes:
        Deviations: unstructured zeros, N:M and blocks go through the same projection. The linear system of equation 3
        is solved with the inverse of H + rho I, which changes every third iteration only, and the product with it goes
        through the CPU's bfloat16 unit where it has one (the masks of SmolLM2-135M come out as good to a thousandth).
        A layer that is on a grid already stays on it: its values are then rounded by the sweep of SparseGPT.
        There are about 35 iterations of one product each, and every third inverts a matrix: solving takes 3.5 times as
        long as SparseGPT's, of a run in which the forward passes take most of the time.
    """

    paper: ClassVar[str] = "arXiv:2406.07831"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    percent_damp: float = hyperparameter(0.01, "added to the diagonal of H, as a fraction of its mean", ge=0, le=1)
    rho: float = hyperparameter(0.1, "penalty of the first iterations, for inputs of unit size", gt=0)
    max_steps: int = hyperparameter(60, "iterations at most; it ends when no zero moves any more", ge=1)
    refit_steps: int = hyperparameter(10, "conjugate-gradient steps towards least squares on the final mask", ge=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The second moments of the inputs, H."""
        return (Gram(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        weight_OI = prunable_weight(solution, layer)
        width = weight_OI.shape[1]
        gram_II = finite_statistic(stats, Gram(), (width, width), layer)
        factor = factorize(gram_II, self.percent_damp, "given", 1, layer)
        weight = torch.from_numpy(weight_OI)
        value, kept_OI = self._solve(weight, factor.gram_II, solution.mask_OI, layer)
        pattern = pattern_of(kept_OI, self.pattern, solution.pattern, solution.mask_OI)
        if solution.grid is not None:
            spans = cut(width, 128)
            value_OI, _ = sweep(
                weight_OI, kept_OI, factor, spans=spans, block_size=128, choose=None, fitted=solution.grid
            )
            return solution.with_matrix(value_OI, kept_OI, pattern, solution.grid)
        value = refit(weight, value, torch.from_numpy(kept_OI), factor.gram_II, self.refit_steps)  # algorithm 2
        return solution.with_matrix(value.numpy(), kept_OI, pattern, None)

    def _solve(
        self, weight: Tensor, gram_II: Tensor, present_OI: BoolArray | None, layer: str
    ) -> tuple[Tensor, BoolArray]:
        """Run ADMM; all matrices are in units in which the diagonal of H is 1 (section 3.3, "preprocessing")."""
        unit_I = gram_II.diagonal().sqrt()
        scaled_II = gram_II / unit_I / unit_I[:, None]
        target_OI = weight * unit_I  # W^
        rho = self.rho
        sparse_OI = target_OI  # D
        dual_OI = torch.zeros_like(weight)  # V
        inverse_II = _inverse(scaled_II, rho)
        kept_OI = seen_OI = np.ones(weight.shape, dtype=np.bool_)
        for step in range(1, self.max_steps + 1):
            with bfloat16_products(True):
                # equation 3, W = (H + rho I)^-1 (H W^ - V + rho D), as a difference to W^: so rounding cannot move ties
                change_OI = torch.sub(sparse_OI, target_OI).mul_(rho).sub_(dual_OI) @ inverse_II
            dense_OI = change_OI.add_(target_OI)
            moved_OI = dense_OI.add(dual_OI, alpha=1 / rho)
            kept_OI = select(moved_OI.abs().numpy(), self.pattern, present_OI, layer)
            sparse_OI = moved_OI * torch.from_numpy(kept_OI)  # D = P_k(W + V / rho)
            dual_OI.add_(dense_OI.sub_(sparse_OI), alpha=rho)  # V = V + rho (W - D)
            if step % _EVERY:
                continue
            num_changed = int(np.count_nonzero(kept_OI != seen_OI))
            if step > _EVERY and num_changed == 0:
                break
            seen_OI = kept_OI
            num_kept = int(np.count_nonzero(kept_OI))
            rho *= next(growth for share, growth in _GROWTH if num_changed >= share * num_kept)
            inverse_II = _inverse(scaled_II, rho)
        return sparse_OI / unit_I, kept_OI


def _inverse(gram_II: Tensor, rho: float) -> Tensor:
    """(H + rho I)^-1: well conditioned, for the diagonal of H is 1."""
    shifted_II = gram_II.clone()
    shifted_II.diagonal().add_(rho)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted_II))
