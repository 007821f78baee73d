"""Random pruning: the baseline of baselines. Shape suffixes: O out, I in."""

import zlib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import WantedPattern
from rarefy.core.solution import Solution
from rarefy.methods.base import check_hyperparameters, hyperparameter, prunable_weight
from rarefy.methods.masks import pruned, select


@final
@dataclass(frozen=True)
class Random:
    """Prune entries by chance; no data needed. What any other method must beat.

    References:
        Blalock et al., What is the State of Neural Network Pruning?, arXiv:2003.03033, section 7.2 (the baseline).

    Notes:
        The seed and the layer's name decide, so that layers differ and a run repeats.
    """

    paper: ClassVar[str] = "arXiv:2003.03033"
    pattern: WantedPattern = hyperparameter(MISSING, "which entries may be zero")
    seed: int = hyperparameter(0, "of the choice", ge=0)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self) -> tuple[Statistic, ...]:
        """Nothing."""
        return ()

    def saliency(
        self, weight_OI: npt.NDArray[np.float32], stats: Mapping[Statistic, Tensor], *, layer: str
    ) -> npt.NDArray[np.float32]:
        """A number in [0, 1) for each weight, drawn; see `HasSaliency.saliency`."""
        del stats  # none is needed
        rng = np.random.default_rng((self.seed, zlib.crc32(layer.encode())))
        return rng.random(weight_OI.shape, dtype=np.float32)

    def compress(self, solution: Solution, stats: Mapping[Statistic, Tensor], *, layer: str) -> Solution:
        """Prune one layer; see `LayerMethod.compress`."""
        score_OI = self.saliency(prunable_weight(solution, layer), stats, layer=layer)
        return pruned(solution, select(score_OI, self.pattern, solution.mask_OI, layer), self.pattern)
