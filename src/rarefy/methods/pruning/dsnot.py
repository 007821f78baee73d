"""DSnoT: refining a mask without training. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, Literal, final

import numpy as np
from torch import Tensor

from rarefy.calibrate.statistics import Mean, SquaredNorm, Statistic
from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Unstructured, WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import BoolArray, FloatArray, pruned, select


@final
@dataclass(frozen=True)
class DSnoT:
    """Swap pruned weights of a row for kept ones while that brings the mean of its output back; no weight is changed.

    References:
        Zhang et al., Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs, arXiv:2310.08915,
        equations 3 (the error), 4 (growing) and 5 (pruning), algorithm 1.

    Notes:
        The mask that is refined is made in the same step: what an earlier step pruned stays pruned. A row is done when
        a swap would not lower |E[error]|, and not at a fixed bound alone, so that no swap makes it worse. Within N:M
        groups a weight is swapped for one of its own group.
    """

    paper: ClassVar[str] = "arXiv:2310.08915"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero: anywhere, or N:M")
    start: Literal["wanda", "magnitude"] = hyperparameter("wanda", "the mask that is refined")
    max_swaps: int = hyperparameter(50, "in each row", ge=1)
    tolerance: float = hyperparameter(0.0, "a row whose |E[error]| is below this is done", ge=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)
        if not isinstance(self.pattern, Unstructured | NM):
            raise PatternError(
                "DSnoT.pattern", "blocks, rows or columns", allowed="{sparsity: S} or {keep: K, group: G}"
            )

    def needs(self) -> tuple[Statistic, ...]:
        """Mean and mean square of each input."""
        return (Mean(), SquaredNorm())

    def saliency(self, weight_OI: FloatArray, stats: Mapping[Statistic, Tensor], *, layer: str) -> FloatArray:
        """What the mask that is refined goes by: |w_oi| ||x_i||, or |w|; see `HasSaliency.saliency`."""
        square_I = finite_statistic(stats, SquaredNorm(), (weight_OI.shape[1],), layer)
        norm_I = square_I.clamp(min=0).sqrt().numpy() if self.start == "wanda" else np.float32(1)
        score_OI: FloatArray = np.abs(weight_OI) * norm_I
        return score_OI

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        weight_OI = prunable_weight(solution, layer)
        width = weight_OI.shape[1]
        mean_I = finite_statistic(stats, Mean(), (width,), layer).numpy()
        square_I = finite_statistic(stats, SquaredNorm(), (width,), layer).clamp(min=0).numpy()
        norm_I = np.sqrt(square_I)
        score_OI = self.saliency(weight_OI, stats, layer=layer)
        kept_OI = select(score_OI, self.pattern, solution.mask_OI, layer, per_row=self.start == "wanda").copy()
        present_OI = np.ones_like(kept_OI) if solution.mask_OI is None else solution.mask_OI
        self._refine(weight_OI, kept_OI, present_OI, mean_I, np.abs(weight_OI) * norm_I, square_I)
        return pruned(solution, kept_OI, self.pattern)

    def _refine(
        self,
        weight_OI: FloatArray,
        kept_OI: BoolArray,
        present_OI: BoolArray,
        mean_I: FloatArray,
        wanda_OI: FloatArray,
        square_I: FloatArray,
    ) -> None:
        """Swap entries of `kept_OI`, in place."""
        change_OI = (weight_OI * mean_I).astype(np.float64)  # what an entry adds to E[output]
        variance_I = np.maximum(square_I - mean_I.astype(np.float64) ** 2, 1e-12 + 1e-6 * square_I.mean())
        gain_OI = change_OI / variance_I
        error_O = np.where(kept_OI, 0, change_OI).sum(axis=1)  # equation 3: E[W x - V x]
        active_R = np.arange(weight_OI.shape[0])
        columns = np.arange(weight_OI.shape[1])
        for _ in range(self.max_swaps):
            active_R = active_R[np.abs(error_O[active_R]) > self.tolerance]
            if not active_R.size:
                return
            sign_R1 = np.sign(error_O[active_R])[:, None]
            kept_RI = kept_OI[active_R]
            # equation 4: grow the pruned entry whose return lowers the error most for its variance
            grow_RI = np.where(present_OI[active_R] & ~kept_RI, sign_R1 * gain_OI[active_R], -np.inf)
            grow_R = grow_RI.argmax(axis=1)
            # equation 5: of the kept entries whose loss lowers the error too, prune the least important
            allowed_RI = kept_RI & (sign_R1 * change_OI[active_R] < 0)
            if isinstance(self.pattern, NM):
                allowed_RI &= columns // self.pattern.group == (grow_R // self.pattern.group)[:, None]
            prune_R = np.where(allowed_RI, wanda_OI[active_R], np.inf).argmin(axis=1)
            rows = np.arange(active_R.size)
            after_R = error_O[active_R] - change_OI[active_R, grow_R] + change_OI[active_R, prune_R]
            possible_R = np.isfinite(grow_RI[rows, grow_R]) & allowed_RI[rows, prune_R]
            better_R = possible_R & (np.abs(after_R) < np.abs(error_O[active_R]))
            active_R, grow_R, prune_R = active_R[better_R], grow_R[better_R], prune_R[better_R]
            kept_OI[active_R, grow_R] = True
            kept_OI[active_R, prune_R] = False
            error_O[active_R] = after_R[better_R]
