"""oBERT: pruning by a block-wise second-order model of the loss.

Shape suffixes: O out, I in.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.gradient_statistics import FisherBlocks, NumTaps
from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter, prunable_weight
from rarefy.methods.masks import pattern_of, select
from rarefy.methods.pruning.fisher_inverse import FisherInverse


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
        is kept and inverted once, which is the same matrix, reads and writes it an eighth as often, and leaves the
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

    def _inverse(self, stats: Mapping[Statistic, Tensor], shape: tuple[int, ...], layer: str) -> FisherInverse:
        rows, width = shape
        size = max(1, min(self.block_size, width))
        shape_of_blocks = (rows, -(-width // size), size * (size + 1) // 2)
        fisher = finite_statistic(stats, FisherBlocks(self.block_size), shape_of_blocks, layer)
        num_taps = int(finite_statistic(stats, NumTaps(), (rows, 1), layer)[0, 0]) if rows else 1
        return FisherInverse(fisher, size, shape, num_taps, self.percent_damp)
