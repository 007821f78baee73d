"""oBERT: pruning by a block-wise second-order model of the loss.

Shape suffixes: O out, I in, G blocks of columns, B columns of a block, N blocks of all rows (O times G).
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rarefy.calibrate.gradient_statistics import FisherBlocks, NumTaps, kernels_whole, taps_apart
from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import BoolArray, FloatArray, pattern_of, select

# Blocks that are worked on together: a few megabytes.
_NUMBERS_AT_ONCE = 1 << 20
# Where rounding leaves less of a diagonal of F^-1, and the most that a weight may cost: more than that is infinite.
_LEAST = 1e-30
_MOST = torch.finfo(torch.float32).max


@final
@dataclass(frozen=True)
class OBERT:
    """Drop the weights that the loss misses least, to second order, and move those left in their block to make up.

    With F the Fisher matrix of a run of columns of one row, dropping weight i costs w_i^2 / (2 [F^-1]_ii), and the
    others then move by -w_i / [F^-1]_ii times column i of F^-1. Which go is found out one at a time: the cheapest
    weight of each block is dropped, the costs of those left are those on the moved weights, and so on to the last; a
    weight's score is the cost at which it went. Blocks do not know of each other, so that one threshold on these scores
    over many blocks, or the whole network, is what dropping the cheapest weight of all, again and again, comes to.

    References:
        Kurtic et al., The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models,
        arXiv:2203.07259, section 3. Frantar, Singh and Alistarh, Optimal Brain Compression, arXiv:2208.11580, section 4
        (one weight at a time, and the orders of independent problems merged).

    Notes:
        Deviations: the paper gets F^-1 by a rank-one update for each gradient (after Woodbury); here the sum of g g^T
        is kept and inverted once, which is the same matrix, reads and writes it a quarter as often, and leaves the
        dampening to the end: `percent_damp` is relative to the mean of the layer's diagonal, where the paper adds 1e-7.
        The paper scores every weight as if it alone were dropped. That counts none of what weights of a block do for
        each other: each may be worth little while the others are there, and all of them a lot. It drops little at a
        time and trains between, where that matters less. A cost never counts for less than that of a weight that went
        before, which keeps the order within a block. Of blocks, rows and columns the sum of the scores counts, and N:M
        groups keep their highest. A layer that is on a grid stays on it: its weights do not move.
    """

    paper: ClassVar[str] = "arXiv:2203.07259"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    block_size: int = hyperparameter(16, "columns of a block of F; memory and time grow with it", ge=1, le=512)
    percent_damp: float = hyperparameter(0.01, "added to the diagonal of F, as a fraction of its mean", gt=0, le=1)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """F in blocks along each row, and how the columns run in it."""
        return FisherBlocks(self.block_size), NumTaps()

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """The cost at which each weight goes; see `HasSaliency.saliency`."""
        blocks = self._inverse(stats, weight_OI.shape, layer)
        return blocks.score_OI(weight_OI)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        weight_OI = prunable_weight(solution, layer)
        blocks = self._inverse(stats, weight_OI.shape, layer)
        earlier_OI = solution.mask_OI
        value_OI = weight_OI if earlier_OI is None else blocks.dropped(weight_OI, ~earlier_OI)
        kept_OI = select(blocks.score_OI(value_OI), self.pattern, earlier_OI, layer)
        value_OI = blocks.dropped(value_OI, ~kept_OI if earlier_OI is None else earlier_OI & ~kept_OI)
        if solution.grid is not None:
            value_OI = weight_OI
        value_OI = np.where(kept_OI, value_OI, np.float32(0))
        final = pattern_of(kept_OI, self.pattern, solution.pattern, solution.mask_OI)
        return solution.with_matrix(value_OI, kept_OI, final, solution.grid)

    def _inverse(self, stats: Mapping[Statistic, Tensor], shape: tuple[int, ...], layer: str) -> "_Inverse":
        rows, width = shape
        size = max(1, min(self.block_size, width))
        shape_of_blocks = (rows, -(-width // size), size, size)
        fisher = finite_statistic(stats, FisherBlocks(self.block_size), shape_of_blocks, layer)
        num_taps = int(finite_statistic(stats, NumTaps(), (rows, 1), layer)[0, 0]) if rows else 1
        return _Inverse(fisher, shape, num_taps, self.percent_damp)


@final
class _Inverse:
    """F^-1 in blocks, of which weights can be dropped one after the other.

    Args:
        fisher: F, float32 (O, G, B, B).
        shape: (O, I).
        num_taps: how many runs of columns, one column a channel, the matrix has.
        percent_damp: see OBERT.
    """

    def __init__(self, fisher: Tensor, shape: tuple[int, ...], num_taps: int, percent_damp: float) -> None:
        self._num_taps = num_taps
        _, self._count, self._size, _ = fisher.shape
        self._shape = shape
        fisher_NBB = fisher.reshape(-1, self._size, self._size)
        mean = float(fisher.diagonal(dim1=2, dim2=3).sum(dtype=torch.float64)) / max(1, shape[0] * shape[1])
        # Where no gradient is known, all weights cost next to nothing, and the larger ones more.
        self._scale = mean or 1e-30
        self._at_once = max(1, _NUMBERS_AT_ONCE // self._size**2)
        self._inverse = [  # of F / scale, each (B, B, N) so that one instruction works on many blocks
            _inverted(part_NBB.permute(1, 2, 0).double() / self._scale, percent_damp).float()
            for part_NBB in torch.split(fisher_NBB, self._at_once)
        ]
        self._free_NB = torch.ones(fisher_NBB.shape[0], self._size, dtype=torch.bool)

    def score_OI(self, weight_OI: FloatArray) -> FloatArray:  # noqa: N802 (shape suffix)
        """The cost at which each weight goes, the cheapest of its block first; 0 of those that are dropped already."""
        weight_NB = self._blocks(torch.from_numpy(weight_OI))
        score_NB = torch.zeros_like(weight_NB)
        for number, inverse_BBN in enumerate(self._inverse):
            part = self._part(number)
            cost_BN = _costs_in_order(
                weight_NB[part].T.contiguous(), inverse_BBN.clone(), self._free_NB[part].T.clone()
            )
            score_NB[part] = (cost_BN.T.double() * (self._scale / 2)).float()
        return self._rows(score_NB)

    def dropped(self, weight_OI: FloatArray, drop_OI: BoolArray) -> FloatArray:
        """The weights after some are dropped, those in their blocks moved; F^-1 is from now on that of the others."""
        weight_NB = self._blocks(torch.from_numpy(weight_OI))
        drop_NB = self._blocks(torch.from_numpy(drop_OI))
        for number, inverse_BBN in enumerate(self._inverse):
            part = self._part(number)
            weight_BN, wide_BBN = weight_NB[part].T.double(), inverse_BBN.double()
            drop_BN = drop_NB[part].T
            for column in range(self._size):
                drop_N = drop_BN[column]
                if not bool(drop_N.any()):
                    continue
                price_N = torch.where(drop_N, wide_BBN[column, column].reciprocal(), 0)
                column_BN = wide_BBN[:, column] * price_N
                weight_BN = weight_BN - column_BN * weight_BN[column]
                weight_BN[column].masked_fill_(drop_N, 0)
                wide_BBN.addcmul_(column_BN[:, None], wide_BBN[column].clone()[None], value=-1)
            self._inverse[number] = wide_BBN.float()
            weight_NB[part] = weight_BN.T.float()
        self._free_NB &= ~drop_NB
        return self._rows(weight_NB)

    def _part(self, number: int) -> slice:
        return slice(number * self._at_once, (number + 1) * self._at_once)

    def _blocks(self, matrix_OI: Tensor) -> Tensor:
        padding = self._count * self._size - self._shape[1]
        own_OI = kernels_whole(matrix_OI, self._num_taps)
        return torch.nn.functional.pad(own_OI, (0, padding)).reshape(-1, self._size)

    def _rows(self, matrix_NB: Tensor) -> FloatArray:
        rows, width = self._shape
        own_OI = matrix_NB.reshape(rows, -1)[:, :width]
        array: FloatArray = taps_apart(own_OI, self._num_taps).contiguous().numpy()
        return array


def _costs_in_order(weight_BN: Tensor, inverse_BBN: Tensor, free_BN: Tensor) -> Tensor:
    """Drop the cheapest free weight of every block until none is left; what each cost then, or one before it if more.

    All three are overwritten. What is not free costs 0.
    """
    cost_BN = torch.zeros_like(weight_BN)
    most_N = torch.zeros_like(weight_BN[0])
    for _ in range(weight_BN.shape[0]):
        cost_of_each_BN = weight_BN.square() / inverse_BBN.diagonal().T.clamp_min(_LEAST)
        now_BN = torch.where(free_BN, cost_of_each_BN.clamp_max(_MOST), math.inf)
        least_N, place_N = now_BN.min(0)
        any_N = least_N < math.inf
        torch.maximum(most_N, torch.where(any_N, least_N, 0), out=most_N)
        place_1N = place_N[None]
        cost_BN.scatter_(0, place_1N, torch.where(any_N, most_N, cost_BN.gather(0, place_1N)))
        free_BN.scatter_(0, place_1N, False)
        column_BN = inverse_BBN.gather(1, place_N.expand(weight_BN.shape[0], 1, -1))[:, 0]
        price_N = torch.where(any_N, column_BN.gather(0, place_1N)[0].reciprocal(), 0)
        scaled_BN = column_BN * price_N
        weight_BN.addcmul_(scaled_BN, weight_BN.gather(0, place_1N), value=-1)
        inverse_BBN.addcmul_(scaled_BN[:, None], column_BN[None], value=-1)
    return cost_BN


def _inverted(matrix_BBN: Tensor, damp: float) -> Tensor:
    """Invert positive definite matrices, all at once, by Gauss-Jordan elimination.

    LAPACK, called for each, takes several times as long at such sizes.
    """
    inverse_BBN = matrix_BBN.contiguous()
    inverse_BBN.diagonal().add_(damp)
    for k in range(inverse_BBN.shape[0]):
        pivot_N = inverse_BBN[k, k].reciprocal()
        row_BN = inverse_BBN[k] * pivot_N
        column_BN = inverse_BBN[:, k].clone()
        inverse_BBN.addcmul_(column_BN[:, None], row_BN[None], value=-1)
        inverse_BBN[k] = row_BN
        inverse_BBN[:, k] = -column_BN * pivot_N
        inverse_BBN[k, k] = pivot_N
    return inverse_BBN
