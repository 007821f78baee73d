"""SVD of an embedding whose rows count by how often they are read. Shape suffixes: O rows, I width, K rank."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from rarefy.calibrate.row_counts import RowCounts
from rarefy.calibrate.statistics import Statistic
from rarefy.core.ranks import Rank
from rarefy.core.solution import Factors, Solution
from rarefy.methods.base import check_hyperparameters, finite_statistic, hyperparameter
from rarefy.methods.lowrank.svd import REMAINDER_DOC
from rarefy.methods.lowrank.truncate import Remainder, factorable_weight, truncate, with_factors


@final
@dataclass(frozen=True)
class FrequencySVD:
    """Truncated SVD of an embedding with each row weighted by the root of how often its token occurs.

    A lookup multiplies with a one-hot vector, so that X X^T is the diagonal matrix of the tokens' counts, and
    ||(W - V)^T X||_F^2 = sum over tokens t of count_t ||w_t - v_t||^2.

    References:
        Chen et al., GroupReduce: Block-Wise Low-Rank Approximation for Neural Language Model Shrinking,
        arXiv:1806.06950, the weighted SVD of a block; Lan et al., ALBERT, arXiv:1909.11942, section 3.1 (factorized
        embedding parameterization).

    Notes:
        The paper cuts the vocabulary into groups by frequency and gives each a rank of its own; here it is one group.
        Tokens that calibration never shows would count nothing, so that `smoothing` adds to every count. Of an
        embedding that is tied to a head only the lookups count; svd-llm counts what the head sees.
    """

    paper: ClassVar[str] = "arXiv:1806.06950"
    rank: Rank = hyperparameter(MISSING, "how many columns the factors have")
    smoothing: float = hyperparameter(1.0, "added to each row's count, as a multiple of their mean", gt=0)
    remainder: Remainder = hyperparameter("drop", REMAINDER_DOC)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """How often each row is looked up."""
        return (RowCounts(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Factorize one embedding; see `LayerMethod.compress`."""
        weight_OI = factorable_weight(solution, layer)
        rows = weight_OI.shape[0]
        num_known = min(rows, stats[RowCounts()].numel()) if RowCounts() in stats else rows
        share_O = torch.zeros(rows)
        share_O[:num_known] = finite_statistic(stats, RowCounts(), (num_known,), layer)
        mean = float(share_O.mean())
        root_O = (share_O + self.smoothing * (mean if mean > 0 else 1.0)).sqrt()[:, None]
        factors = truncate(weight_OI * root_O, self.rank, None)
        left_OK = (torch.from_numpy(factors.left_OK) / root_O).numpy()
        return with_factors(solution, Factors(left_OK, factors.right_KI), self.remainder)
