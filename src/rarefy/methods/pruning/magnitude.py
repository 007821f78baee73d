"""Magnitude pruning: drop the weights of smallest absolute value. Shape suffixes: O out, I in."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import NM, Blocks, Pattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, hyperparameter
from rarefy.methods.masks import pattern_of, select_blocks, select_nm, select_unstructured


@final
@dataclass(frozen=True)
class Magnitude:
    """Keep the weights with the largest |w|; no data needed.

    Unstructured zeros and blocks (by the sum of their |w|) are chosen over the whole layer, N:M ones in each group.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, arXiv:1506.02626, section 3.1.

    Notes:
        The paper prunes against a threshold and retrains; here the threshold is what gives the sparsity asked for.
    """

    paper: ClassVar[str] = "arXiv:1506.02626"
    pattern: Pattern = hyperparameter(MISSING, "which entries may be zero")

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing: the weights say it all."""
        return ()

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        del stats  # none is needed
        weight_OI = solution.weight_OI
        check_finite_weight(weight_OI, layer)
        score_OI = np.abs(weight_OI)
        present_OI = solution.mask_OI
        if isinstance(self.pattern, NM):
            self.pattern.check_fits(weight_OI.shape[1], layer)
            kept_OI = select_nm(score_OI, self.pattern, present_OI)
        elif isinstance(self.pattern, Blocks):
            kept_OI = select_blocks(score_OI, self.pattern, present_OI)
        else:
            present = None if present_OI is None else present_OI.reshape(1, -1)
            kept_OI = select_unstructured(score_OI.reshape(1, -1), self.pattern.sparsity, present)
            kept_OI = kept_OI.reshape(weight_OI.shape)
        pattern = pattern_of(kept_OI, self.pattern, solution.pattern, present_OI)
        return Solution(np.where(kept_OI, weight_OI, np.float32(0)), kept_OI, pattern, solution.grid)
