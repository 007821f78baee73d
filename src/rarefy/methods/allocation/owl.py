"""OWL: amounts from the outliers of each layer. Shape suffixes: O out, I in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import Unstructured
from rarefy.methods.allocation.base import DenseModel, LayerShape
from rarefy.methods.base import LayerMethod, check_hyperparameters, hyperparameter
from rarefy.methods.pruning.wanda import Wanda

# The score does not depend on the pattern.
_SCORE = Wanda(Unstructured(0.0))


@final
@dataclass(frozen=True)
class OWL:
    """Blocks with many outliers give less. All layers of a block give the same, as in the paper.

        A_oi = |w_oi| * ||x_i||_2,    D = share of the entries of a block with A_oi > M * mean(A)

    References:
        Yin et al., Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity,
        arXiv:2310.05175, section 3.2 (layerwise outlier distribution, D) and 3.3 (the amounts, within lambda).

    Notes:
        As in the authors' code, D is stretched to a range of 2 lambda and shifted so that the mean is what is asked;
        one block may so differ from it by more than lambda. The mean counts every weight, and not every block, once: of
        blocks of one size that is the same. Where a block would have to give less than nothing or more than all, the
        range is as narrow as that takes. Layers outside of the blocks, and those of a model without any, each count as
        a block. The statistics are those of the dense model. M = 5 and lambda = 0.08 are the authors' for LLaMA-7B.
    """

    paper: ClassVar[str] = "arXiv:2310.05175"
    threshold: float = hyperparameter(5.0, "M: entries above so many times the mean of their block are outliers", gt=0)
    spread: float = hyperparameter(0.08, "lambda: half of the range of the amounts", ge=0, le=1)

    def __post_init__(self) -> None:
        check_hyperparameters(self)

    def needs(self, method: LayerMethod) -> tuple[Statistic, ...]:
        """The mean square of each input, whatever the method."""
        del method
        return _SCORE.needs()

    def measured_amounts(
        self, sparsity: float, layers: Sequence[LayerShape], method: LayerMethod, dense: DenseModel
    ) -> dict[str, float]:
        """From the outliers of every block; see `ModelAllocation.measured_amounts`."""
        outliers: dict[str, float] = {}
        for block in dense.blocks(self.needs(method)):
            mean = np.average(
                [layer.saliency(_SCORE).mean(dtype=np.float64) for layer in block],
                weights=[layer.weight_OI.size for layer in block],
            )
            # a score at a time: those of a whole block need not be in memory
            counts = [np.count_nonzero(layer.saliency(_SCORE) > self.threshold * mean) for layer in block]
            share = sum(counts) / sum(layer.weight_OI.size for layer in block)  # D
            outliers |= {layer.name: share for layer in block}
        seen = [layer for layer in layers if layer.name in outliers]
        if not seen:
            return {}
        share_L = np.array([outliers[layer.name] for layer in seen])
        width = float(share_L.max() - share_L.min())
        stretched_L = 2 * self.spread * (share_L - share_L.min()) / (width or 1.0)
        more_L = stretched_L - np.average(stretched_L, weights=[layer.size for layer in seen])  # than the mean density
        limits = [(1 - sparsity if more < 0 else sparsity) / abs(more) for more in more_L if more != 0]
        room = min([1.0, *limits])  # 1 where no amount leaves [0, 1]
        sparsity_L = np.clip(sparsity - room * more_L, 0, 1)
        return {layer.name: float(amount) for layer, amount in zip(seen, sparsity_L, strict=True)}
