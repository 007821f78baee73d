"""ERK: amounts from shapes, by the random graphs of Erdos and Renyi."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from rarefy.methods.allocation.base import LayerShape


@final
@dataclass(frozen=True)
class ERK:
    """Large layers give more: a layer keeps in proportion to the sum of its axes, not to their product.

        density = epsilon * (n_in + n_out + w + h) / (n_in * n_out * w * h)

    References:
        Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity inspired by
        Network Science, arXiv:1707.04780, equation 1 (linear layers); Evci et al., Rigging the Lottery,
        arXiv:1911.11134, section 3 (1), "Erdos-Renyi-Kernel" (the taps of convolutions count too).

    Notes:
        epsilon is what gives the sparsity asked for. Layers that it would give more than all of their weights keep them
        all, and epsilon is found again for the others (the authors' code, sparse_utils.py).
    """

    paper: ClassVar[str] = "arXiv:1911.11134"

    def amounts(self, sparsity: float, layers: Sequence[LayerShape]) -> dict[str, float]:
        """From shapes alone; see `ShapeAllocation.amounts`."""
        raw = {layer.name: sum(layer.shape) / max(1, layer.size) for layer in layers}
        num_kept = (1 - sparsity) * sum(layer.size for layer in layers)
        dense: set[str] = set()
        while True:
            others = [layer for layer in layers if layer.name not in dense]
            num_left = num_kept - sum(layer.size for layer in layers if layer.name in dense)
            epsilon = num_left / max(1e-30, sum(raw[layer.name] * layer.size for layer in others))
            full = {layer.name for layer in others if epsilon * raw[layer.name] > 1}
            if not full:
                break
            dense |= full
        return {layer.name: 0.0 if layer.name in dense else max(0.0, 1 - epsilon * raw[layer.name]) for layer in layers}
