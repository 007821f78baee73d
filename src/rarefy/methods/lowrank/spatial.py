"""Spatial factors of a convolution. Shape suffixes: O out, C channels in, Y rows of taps, X taps of a row, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from math import prod
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.ranks import Rank, TapRanks
from rarefy.core.solution import Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.methods.base import check_hyperparameters, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.taps import FIT_DOC, Fit, fitted, kernel_of, needs_of, why_no_kernel
from rarefy.methods.lowrank.truncate import Remainder, truncate


@final
@dataclass(frozen=True)
class Spatial:
    """Put a convolution into two: one along the last axis to K channels, then one along the others.

        W[o, y, x, c] = sum_k L[o, y, k] R[k, x, c]

    References:
        Jaderberg, Vedaldi and Zisserman, Speeding up Convolutional Neural Networks with Low Rank Expansions,
        arXiv:1405.3866, section 2.2 (scheme 2, equation 5), solved in closed form by Tai et al., Convolutional neural
        networks with low-rank regularization, arXiv:1511.06067, theorem 1 (the SVD of the kernel as a matrix).

    Notes:
        The horizontal filters come first, the vertical ones after; the papers have them the other way round. Of the
        paper's reconstruction of the outputs on data (section 2.4), which alternates between both, `fit: outputs` does
        one step: the least squares of the last filters.
    """

    paper: ClassVar[str] = "arXiv:1405.3866"
    rank: Rank = hyperparameter(MISSING, "how many channels lie between the two convolutions")
    fit: Fit = hyperparameter("weights", FIT_DOC)
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing, or the second moments of the inputs where outputs are fitted."""
        return needs_of(self.fit)

    def misfit(self, kind: str, shape: tuple[int, ...]) -> str | None:
        """Why the method does not fit a layer of a kind with a weight (O, C, *taps); None if it does."""
        if kind == "conv" and sum(size > 1 for size in shape[2:]) < 2:
            return "its taps lie along one axis at most; svd, svd-llm and tucker fit it"
        return why_no_kernel(kind, shape)

    def most_ranks(self, shape: tuple[int, ...]) -> TapRanks:
        """The rank for a weight (O, C, *taps), or the largest that it can become where singular values decide."""
        num_rows = prod(shape[2:-1])
        return TapRanks(num_rows, self.rank.most((shape[0] * num_rows, shape[1] * shape[-1])), None)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one layer; see `LayerMethod.compress`."""
        kernel = kernel_of(solution, layer)
        rows, num_rows = kernel.shape[0], prod(solution.taps[:-1])
        # by rows of taps, which are runs of columns: (O Y, X C)
        factors = truncate(kernel.reshape(rows * num_rows, -1), self.rank, None)
        left_OYK = torch.from_numpy(factors.left_OK).reshape(rows, num_rows * factors.rank)
        left = np.ascontiguousarray(left_OYK.numpy())
        taps = TapFactors(left, None, factors.right_KI, num_rows)
        return fitted(solution, taps, self.fit, self.remainder, stats, layer)
