"""Tucker-2 factors of a convolution. Shape suffixes: O out, C channels in, S taps, A and R their ranks."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from math import prod, sqrt
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.ranks import FACTOR_ITEM_BYTES, Rank, TapRanks
from rarefy.core.solution import Solution
from rarefy.core.tap_factors import TapFactors
from rarefy.methods.base import check_hyperparameters, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.taps import FIT_DOC, Fit, fitted, kernel_of, leading, needs_of, why_no_kernel
from rarefy.methods.lowrank.truncate import Remainder


@final
@dataclass(frozen=True)
class Tucker:
    """Put a convolution into three: 1 x 1 to fewer channels, a core of all taps, 1 x 1 to the outputs.

        W[o, s, c] = sum_ar L[o, a] G[a, s, r] R[r, c]

    References:
        Kim et al., Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications,
        arXiv:1511.06530, section 3.1 (Tucker-2, equations 3 to 5). The alternation is that of De Lathauwer, De Moor and
        Vandewalle, On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors (2000), algorithm
        4.2, which the paper's higher-order SVD starts.

    Notes:
        The paper finds both ranks by variational Bayes; here `rank` says them. With `ratio` and `num_bytes` both are
        the same share of the layer's outputs and channels, the largest with which the three factors keep to it;
        `energy` is asked of each unfolding; `count` is the rank on both sides. `fit: outputs` is an addition: least
        squares of the left factor on the layer's outputs, in place of the paper's fine-tuning.
    """

    paper: ClassVar[str] = "arXiv:1511.06530"
    rank: Rank = hyperparameter(MISSING, "how many outputs and channels the core has, said once for both")
    num_steps: int = hyperparameter(3, "rounds of alternation after the higher-order SVD", ge=0)
    fit: Fit = hyperparameter("weights", FIT_DOC)
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing, or the second moments of the inputs where outputs are fitted."""
        return needs_of(self.fit)

    def misfit(self, kind: str, shape: tuple[int, ...]) -> str | None:
        """Why the method does not fit a layer of a kind with a weight (O, C, *taps); None if it does."""
        return why_no_kernel(kind, shape)

    def most_ranks(self, shape: tuple[int, ...]) -> TapRanks:
        """The ranks for a weight (O, C, *taps), or the largest that they can become where singular values decide."""
        outer, inner = _ranks(self.rank, shape[0], shape[1], prod(shape[2:]))
        return TapRanks(prod(shape[2:]), inner, outer)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one layer; see `LayerMethod.compress`."""
        kernel_OSC = kernel_of(solution, layer)
        rows, num_taps, channels = kernel_OSC.shape
        outer, inner = _ranks(self.rank, rows, channels, num_taps)
        out_OO = torch.einsum("osc,psc->op", kernel_OSC, kernel_OSC)
        in_CC = torch.einsum("osc,osd->cd", kernel_OSC, kernel_OSC)
        if self.rank.energy is not None:
            outer, inner = (_by_energy(self.rank, squares) for squares in (out_OO, in_CC))
        left_OA, right_CR = leading(out_OO, outer), leading(in_CC, inner)  # the higher-order SVD
        for _ in range(self.num_steps):  # each is the best for the other
            part_OSR = kernel_OSC @ right_CR
            left_OA = leading(torch.einsum("osr,psr->op", part_OSR, part_OSR), outer)
            part_ASC = torch.einsum("oa,osc->asc", left_OA, kernel_OSC)
            right_CR = leading(torch.einsum("asc,asd->cd", part_ASC, part_ASC), inner)
        core_ASR = torch.einsum("oa,osc->asc", left_OA, kernel_OSC) @ right_CR
        left, core, right = (
            np.ascontiguousarray(part.float().numpy()) for part in (left_OA, core_ASR.reshape(outer, -1), right_CR.T)
        )
        factors = TapFactors(left, core, right, num_taps)
        return fitted(solution, factors, self.fit, self.remainder, stats, layer)


def _ranks(rank: Rank, rows: int, channels: int, num_taps: int) -> tuple[int, int]:
    """Outputs and channels of the core."""
    if rank.count is not None:
        return min(rank.count, rows), min(rank.count, channels)
    if rank.energy is not None:
        return rows, channels
    size = rows * num_taps * channels
    budget = rank.num_bytes / FACTOR_ITEM_BYTES if rank.num_bytes is not None else (rank.ratio or 0.0) * size
    # share s of both: s^2 size + s (rows^2 + channels^2) numbers
    linear = rows**2 + channels**2
    share = min(1.0, (sqrt(linear**2 + 4 * size * budget) - linear) / (2 * size))
    return max(1, int(share * rows)), max(1, int(share * channels))


def _by_energy(rank: Rank, squares_NN: Tensor) -> int:
    squares_N = torch.linalg.eigvalsh(squares_NN).flip(0).clamp(min=0)
    return rank.choose((squares_N.numel(), squares_N.numel()), squares_N.numpy())
