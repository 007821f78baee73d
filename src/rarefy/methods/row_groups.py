"""Methods on a layer whose rows meet inputs of their own, group by group: a depthwise convolution.

Shape suffixes: O out, I in, G groups of rows.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

from rarefy.calibrate.statistics import Gram, Statistic
from rarefy.core.patterns import NM, Blocks, Lines, Unstructured
from rarefy.core.solution import Solution, cut_rows, stack
from rarefy.methods.base import HasSaliency, LayerMethod
from rarefy.methods.masks import BoolArray, FloatArray, pattern_of, select, sum_blocks

_Stats = Mapping[Statistic, Tensor]


def compress_in_groups(
    method: LayerMethod, solution: Solution, stats: _Stats, num_groups: int, *, layer: str
) -> Solution:
    """Apply a method to a layer; one that reads statistics solves each group of rows on those of its own inputs.

    Args:
        method: the method.
        solution: of the whole layer.
        stats: what the method reads; where there are several groups, one of each along a first axis.
        num_groups: so many parts of the rows, of equal size, meet inputs of their own.
        layer: the name that error messages carry.

    Raises:
        NonFiniteError: a weight or statistic is NaN or infinite.
        PatternError: the pattern or grid does not fit the layer.

    Notes:
        The whole layer has as many zeros as the pattern says. Whole rows compete over the layer, by the method's
        saliency, or by w^2 E[x^2] where it has none; of other zeros every group gives its share.
    """
    if num_groups == 1 or not method.needs():
        return method.compress(solution, stats, layer=layer)
    parts = cut_rows(solution, num_groups)
    stats_G = [{statistic: value[group] for statistic, value in stats.items()} for group in range(num_groups)]
    methods = _shared_out(method, solution, parts, stats_G, layer)
    done = stack(
        [own.compress(part, each, layer=layer) for own, part, each in zip(methods, parts, stats_G, strict=True)]
    )
    wanted = getattr(method, "pattern", None)
    if wanted is None or done.mask_OI is None:
        return dataclasses.replace(done, pattern=solution.pattern)
    return dataclasses.replace(done, pattern=pattern_of(done.mask_OI, wanted, solution.pattern, solution.mask_OI))


def _shared_out(
    method: LayerMethod, solution: Solution, parts: Sequence[Solution], stats_G: Sequence[_Stats], layer: str
) -> list[LayerMethod]:
    """The method for each group, with so many zeros that all groups together have what its pattern says."""
    wanted = getattr(method, "pattern", None)
    if wanted is None or isinstance(wanted, NM):
        return [method] * len(parts)
    if isinstance(wanted, Lines):
        score_OI = np.concatenate(
            [_saliency(method, part, stats, layer) for part, stats in zip(parts, stats_G, strict=True)]
        )
        kept_OI = select(score_OI, wanted, solution.mask_OI, layer)
        shares = [1.0 - float(kept_OI.any(axis=1).mean()) for kept_OI in np.split(kept_OI, len(parts))]
    else:
        units_G = [_units(part, wanted) for part in parts]
        num_zero_G = _even(round(wanted.sparsity * sum(x.size for x in units_G)), [int((~x).sum()) for x in units_G])
        shares = [zeros / max(1, units.size) for zeros, units in zip(num_zero_G, units_G, strict=True)]
    return [
        dataclasses.replace(method, pattern=dataclasses.replace(wanted, sparsity=share))  # type: ignore[type-var]
        for share in shares
    ]


def _units(part: Solution, pattern: Unstructured | Blocks) -> BoolArray:
    """What is zero as a whole or not at all, entries or blocks: False for those that are zero already."""
    present_OI = np.ones(part.shape, dtype=np.bool_) if part.mask_OI is None else part.mask_OI
    return present_OI if isinstance(pattern, Unstructured) else sum_blocks(present_OI, pattern) > 0


def _even(total: int, least_G: Sequence[int]) -> list[int]:
    """Share a number out among groups as evenly as can be where each has some already."""
    given = list(least_G)
    open_groups = list(range(len(given)))
    while open_groups:
        left = max(0, total - sum(least for group, least in enumerate(least_G) if group not in open_groups))
        ends = [round(left * place / len(open_groups)) for place in range(len(open_groups) + 1)]
        quotas = {group: stop - start for group, (start, stop) in zip(open_groups, pairwise(ends), strict=True)}
        crowded = {group for group, quota in quotas.items() if least_G[group] > quota}
        if not crowded:
            for group, quota in quotas.items():
                given[group] = quota
            break
        open_groups = [group for group in open_groups if group not in crowded]
    return given


def _saliency(method: LayerMethod, part: Solution, stats: _Stats, layer: str) -> FloatArray:
    if isinstance(method, HasSaliency):
        return method.saliency(part.weight_OI, stats, layer=layer)
    score_OI: FloatArray = np.square(part.weight_OI)
    gram_II = stats.get(Gram())
    return score_OI if gram_II is None else score_OI * gram_II.diagonal().numpy().astype(np.float32)
