"""One threshold for all layers.

Shape suffixes: O out, I in, N units (of which each is zero as a whole or not at all), R and C rows and columns of
blocks, U different values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import numpy.typing as npt

from rarefy.calibrate.statistics import Statistic
from rarefy.core.patterns import Blocks
from rarefy.methods.allocation.base import DenseModel, LayerShape
from rarefy.methods.base import HasSaliency, LayerMethod
from rarefy.methods.masks import concrete, sum_blocks

_HALF = 16
_NUM_BINS = 1 << _HALF


@final
@dataclass(frozen=True)
class Global:
    """Zeros compete over all layers by the method's own saliency: each layer gives what falls below one threshold.

    References:
        Blalock et al., What is the State of Neural Network Pruning?, arXiv:2003.03033, section 2.3 (scores compared
        "globally"); Lee et al., SNIP, arXiv:1810.02340, algorithm 1 (one top-k over the whole network).

    Notes:
        The threshold is exact, and no more than the scores of one layer are in memory: a first walk counts them by the
        16 upper bits of their float32, which finds those bits of the threshold; a second one counts the lower bits
        of the few that have the same upper bits. Of scores at the threshold itself those of earlier layers are kept.
        Whole blocks, rows and columns compete by the mean of their entries, so that what counts is the loss for each
        zero. N:M zeros compete as if they could be anywhere; a layer then gets the whole number of entries in a group
        that is closest. A method that compares weights within a row still does so, with its layer's amount.
    """

    paper: ClassVar[str] = "arXiv:2003.03033"

    def needs(self, method: LayerMethod) -> tuple[Statistic, ...]:
        """What the method's saliency reads."""
        return method.needs()

    def measured_amounts(
        self, sparsity: float, layers: Sequence[LayerShape], method: LayerMethod, dense: DenseModel
    ) -> dict[str, float]:
        """From the scores of all weights; see `ModelAllocation.measured_amounts`."""
        del layers  # the dense model gives those that count
        assert isinstance(method, HasSaliency)
        num_upper = np.zeros(_NUM_BINS)  # weights whose scores have these upper bits
        sizes: dict[str, int] = {}
        for name, key_N, size in _units(method, dense):
            num_upper += size * np.bincount(key_N >> _HALF, minlength=_NUM_BINS)
            sizes[name] = sizes.get(name, 0) + size * key_N.size
        budget = round(sparsity * sum(sizes.values()))
        upper_bits = min(int(np.searchsorted(np.cumsum(num_upper), budget)), _NUM_BINS - 1)
        zeros = dict.fromkeys(sizes, 0)
        near: list[tuple[int, int, int, int]] = []  # lower bits, place of the layer (negative), size, how many
        places = {name: place for place, name in enumerate(sizes)}
        for name, key_N, size in _units(method, dense):
            upper_N = key_N >> _HALF
            zeros[name] += size * int(np.count_nonzero(upper_N < upper_bits))
            low_U, count_U = np.unique(key_N[upper_N == upper_bits] & (_NUM_BINS - 1), return_counts=True)
            near += [
                (low, -places[name], size, count) for low, count in zip(low_U.tolist(), count_U.tolist(), strict=True)
            ]
        left = budget - sum(zeros.values())
        names = list(sizes)
        for _, place, size, count in sorted(near):
            num_zero = min(count, max(0, -(-(2 * left - size) // (2 * size))))  # so many bring the total closest
            zeros[names[-place]] += num_zero * size
            left -= num_zero * size
            if num_zero < count:
                break
        return {name: zeros[name] / max(1, sizes[name]) for name in names}


def _units(method: HasSaliency, dense: DenseModel) -> Iterator[tuple[str, npt.NDArray[np.uint32], int]]:
    """The scores of what is zero as a whole, as keys that sort as they do, for each layer and size of a unit."""
    for block in dense.blocks(method.needs()):
        for layer in block:
            score_OI = layer.saliency(method)
            wanted = concrete(getattr(method, "pattern"), score_OI.shape, layer.name)  # noqa: B009
            if not isinstance(wanted, Blocks):
                yield layer.name, _sortable(score_OI.ravel()), 1
                continue
            size_RC = sum_blocks(np.ones(score_OI.shape, dtype=np.bool_), wanted).astype(np.int64)
            score_RC = (sum_blocks(score_OI, wanted) / size_RC).astype(np.float32)
            for size in np.unique(size_RC).tolist():  # smaller ones at the edges
                yield layer.name, _sortable(score_RC[size_RC == size]), size


def _sortable(score_N: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """The bits of float32 numbers so that as integers they sort as the numbers do; +0 and -0 are one."""
    bits_N = (np.ascontiguousarray(score_N) + np.float32(0)).view(np.uint32)
    negative_N = bits_N >> 31 == 1
    return np.where(negative_N, ~bits_N, bits_N | np.uint32(1 << 31))
