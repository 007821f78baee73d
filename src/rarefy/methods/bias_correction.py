"""Bias correction: what the outputs lost on average. Shape suffixes: O out, I in."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from torch import Tensor

from rarefy.calibrate.statistics import Mean, Statistic
from rarefy.core.solution import Solution
from rarefy.methods.base import check_finite_weight, check_hyperparameters, finite_statistic
from rarefy.methods.factors import check_finite_factors


@final
@dataclass(frozen=True)
class BiasCorrection:
    """Add to each output what the earlier steps took from its mean: (W - V) E[x] goes into the layer's bias.

    References:
        Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv:1906.04721, section
        4.2 (E[y] - E[y~] = -epsilon E[x]), with E[x] from data.

    Notes:
        W is the weight before all steps; it is the last step of a layer. A layer without a bias is given one, where its
        outputs are all that the bias is added to: not in recurrent layers that were made without, and not in an
        embedding or a head that is tied to one. The report names those. E[x] is that of the inputs that come through
        the compressed blocks before, as everywhere here, so that only the shift of this layer's own weights is made up
        for, and not those of the blocks before; the paper's appendix D compares with the outputs of the dense network.
        That can make things worse: docs/methods.md. Rounding to bfloat16 in storage comes later, and its shift stays.
    """

    paper: ClassVar[str] = "arXiv:1906.04721"

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """The mean of each input."""
        return (Mean(),)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Correct one layer; see `LayerMethod.compress`."""
        check_finite_weight(solution.weight_OI, layer)
        if solution.factors is not None:
            check_finite_factors(solution.factors, layer)
        mean_I = finite_statistic(stats, Mean(), (solution.shape[1],), layer).double().numpy()
        if solution.original_OI is None:
            return solution
        lost_OI = solution.original_OI.astype(np.float64) - solution.value_OI
        return dataclasses.replace(solution, bias_O=(lost_OI @ mean_I).astype(np.float32))
