"""The same fraction of zeros in every layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from rarefy.methods.allocation.base import LayerShape


@final
@dataclass(frozen=True)
class Uniform:
    """Every layer gives the same fraction.

    References:
        Gale et al., The State of Sparsity in Deep Neural Networks, arXiv:1902.09574, section 3 (the baseline).
    """

    paper: ClassVar[str] = "arXiv:1902.09574"

    def amounts(self, sparsity: float, layers: Sequence[LayerShape]) -> dict[str, float]:
        """The same for all; see `ShapeAllocation.amounts`."""
        return {layer.name: sparsity for layer in layers}
