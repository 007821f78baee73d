"""OATS: low rank plus sparse by alternating thresholds. Shape suffixes: O out, I in, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import SquaredNorm, Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.ranks import Rank
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, finite_statistic, hyperparameter
from rarefy.methods.lowrank.truncate import Metric, factorable_weight, is_dense, truncate
from rarefy.methods.masks import pattern_of, select


@final
@dataclass(frozen=True)
class OATS:
    """Split W D, D the sizes of the inputs, into a low-rank and a sparse part, each fitted to what the other leaves.

    References:
        Zhang and Papyan, OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition, arXiv:2409.13652,
        section 2 (alternating thresholding), section 3.1 (W D with D = sqrt(diag(X^T X))), algorithm 1.

    Notes:
        The paper gives one compression ratio and the share of it that goes to the factors; here `rank` and `pattern`
        say both parts. The singular vectors of the alternation follow it by one step of subspace iteration each time,
        instead of a fresh SVD: what moves from one alternation to the next is small; the last factors are exact.
        The 80 alternations, each an SVD in the paper, are why this takes longer than SparseGPT.
        Zeros of an earlier step stay zeros of the sparse part, which stays on a grid that it is on.
    """

    paper: ClassVar[str] = "arXiv:2409.13652"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    pattern: WantedPattern = hyperparameter(MISSING, "which entries of the sparse part may be zero")
    num_steps: int = hyperparameter(80, "alternations", ge=1)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean square of each input."""
        return (SquaredNorm(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Split one layer; see `LayerMethod.compress`."""
        factorable_weight(solution, layer)
        target = torch.from_numpy(solution.weight_OI if is_dense(solution) else solution.target_OI)
        check_finite_weight(target.numpy(), layer)
        size_I = finite_statistic(stats, SquaredNorm(), (target.shape[1],), layer).clamp(min=0).sqrt()
        # D; a column that is never excited counts little
        scale_I = size_I.clamp(min=max(1e-6 * float(size_I.mean()), 1e-30))
        scaled_OI = target * scale_I
        # values that are on a grid can only be left out
        fixed_OI = None if solution.grid is None else torch.from_numpy(solution.weight_OI) * scale_I
        metric = Metric(scale_I.double(), 1 / scale_I.double())

        def sparse_part(low_rank_OI: Tensor) -> tuple[Tensor, "np.ndarray[tuple[int, int], np.dtype[np.bool_]]"]:
            rest_OI = scaled_OI - low_rank_OI
            values_OI = rest_OI if fixed_OI is None else fixed_OI
            # a fixed value is worth how much closer it brings the rest to zero
            gain_OI = rest_OI.abs() if fixed_OI is None else rest_OI.square() - (rest_OI - fixed_OI).square()
            kept_OI = select(gain_OI.numpy(), self.pattern, solution.mask_OI, layer, per_row=True)
            return values_OI * torch.from_numpy(kept_OI), kept_OI

        start = truncate(target, self.rank, metric)
        basis_IK = torch.linalg.qr(torch.from_numpy(start.right_KI.T) * scale_I[:, None])[0]
        sparse_OI = torch.zeros_like(scaled_OI)
        for _ in range(self.num_steps):  # algorithm 1
            rest_OI = scaled_OI - sparse_OI
            basis_IK = torch.linalg.qr(rest_OI.T @ (rest_OI @ basis_IK))[0]
            sparse_OI, _ = sparse_part((rest_OI @ basis_IK) @ basis_IK.T)
        factors = truncate((scaled_OI - sparse_OI) / scale_I, Rank(count=max(1, start.rank)), metric)
        sparse_OI, kept_OI = sparse_part(torch.from_numpy(factors.product_OI) * scale_I)
        matrix_OI = (sparse_OI / scale_I).numpy()
        if solution.grid is not None:  # exactly as they were
            matrix_OI = np.where(kept_OI, solution.weight_OI, np.float32(0))
        pattern = pattern_of(kept_OI, self.pattern, solution.pattern, solution.mask_OI)
        return Solution(matrix_OI, kept_OI, pattern, solution.grid, factors, solution.original_OI)
