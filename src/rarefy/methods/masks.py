"""Choosing which entries to keep, for every pattern, and combining the choice with the zeros that are there already.

Shape suffixes: O out (rows), I in (columns), N entries that compete with each other, R rows and C columns of blocks.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from rarefy.core.patterns import NM, Blocks, Lines, Pattern, WantedPattern
from rarefy.core.solution import Solution

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]


def keep_highest(score_ON: FloatArray, num_keep: int) -> BoolArray:
    """Keep exactly `num_keep` entries of every row: the highest scores, and of equal scores those further left.

    Args:
        score_ON: float32 (O, N), finite; +inf and -inf are allowed and compare as usual.
        num_keep: in [0, N].

    Returns:
        bool (O, N), True where kept.
    """
    rows, width = score_ON.shape
    if num_keep == width or score_ON.size == 0:
        return np.ones((rows, width), dtype=np.bool_)
    if num_keep == 0:
        return np.zeros((rows, width), dtype=np.bool_)
    threshold_O1 = np.partition(score_ON, width - num_keep, axis=1)[:, width - num_keep, None]
    kept_ON: BoolArray = score_ON > threshold_O1
    num_missing_O = num_keep - np.count_nonzero(kept_ON, axis=1)
    tied_ON: BoolArray = score_ON == threshold_O1
    # rows in which the threshold itself is unique need no look at the order of ties
    easy_O = np.count_nonzero(tied_ON, axis=1) == num_missing_O
    if easy_O.all():
        return kept_ON | tied_ON
    place_ON = np.cumsum(tied_ON, axis=1)
    first_ON: BoolArray = tied_ON & (place_ON <= num_missing_O[:, None])
    return kept_ON | first_ON


def concrete(pattern: WantedPattern, shape: tuple[int, ...], layer: str) -> Pattern:
    """The pattern that a layer of this shape gets.

    Raises:
        PatternError: it does not fit the layer.
    """
    rows, width = shape
    if isinstance(pattern, NM):
        pattern.check_fits(width, layer)
    return pattern.fit((rows, width)) if isinstance(pattern, Lines) else pattern


def select(
    score_OI: FloatArray, pattern: WantedPattern, present_OI: BoolArray | None, layer: str, *, per_row: bool = False
) -> BoolArray:
    """Keep the entries with the highest scores that a pattern allows; zeros that are there already always stay.

    Args:
        score_OI: float32, what pruning an entry would cost; of a block the sum counts.
        pattern: which entries may be zero.
        present_OI: bool, False where an entry was pruned earlier; None: all are present.
        layer: the name for error messages.
        per_row: unstructured zeros compete within their row, and blocks within their row of blocks, not over the layer.

    Raises:
        PatternError: the layer is narrower than an N:M group.
    """
    per_row = per_row and not isinstance(pattern, Lines)  # whole rows compete with each other
    pattern = concrete(pattern, score_OI.shape, layer)
    if isinstance(pattern, NM):
        return select_nm(score_OI, pattern, present_OI)
    if isinstance(pattern, Blocks):
        return select_blocks(score_OI, pattern, present_OI, per_row=per_row)
    if per_row:
        return select_unstructured(score_OI, pattern.sparsity, present_OI)
    present = None if present_OI is None else present_OI.reshape(1, -1)
    return select_unstructured(score_OI.reshape(1, -1), pattern.sparsity, present).reshape(score_OI.shape)


def num_pruned(sparsity: float, start: int, stop: int) -> int:
    """Zeros due in entries [start, stop) of a layer, so that the parts of any division of it sum to the total."""
    return round(sparsity * stop) - round(sparsity * start)


def select_unstructured(
    score_ON: FloatArray, sparsity: float, present_ON: BoolArray | None, offset: int = 0
) -> BoolArray:
    """Prune a fraction of every row; zeros that are there already count towards it and always stay.

    The rows follow one another in the layer, from entry `offset` on: of rows in which the fraction is no integer, some
    lose one entry more than others, so that the whole layer has exactly round(sparsity * O * I) zeros.

    Args:
        score_ON: float32 (O, N), what pruning an entry would cost.
        sparsity: fraction of zeros.
        present_ON: bool (O, N), False where an entry was pruned earlier; None: all are present.
        offset: how many entries of the layer come before the first.
    """
    rows, width = score_ON.shape
    if present_ON is not None:
        score_ON = np.where(present_ON, score_ON, -np.inf)
    ends = [offset + row * width for row in range(rows + 1)]
    num_keep_O = np.array([width - num_pruned(sparsity, start, stop) for start, stop in pairwise(ends)], dtype=np.int64)
    kept_ON = np.empty((rows, width), dtype=np.bool_)
    for num_keep in np.unique(num_keep_O):
        these_O = num_keep_O == num_keep
        kept_ON[these_O] = keep_highest(score_ON[these_O], int(num_keep))
    return kept_ON if present_ON is None else kept_ON & present_ON


def select_nm(score_OI: FloatArray, pattern: NM, present_OI: BoolArray | None) -> BoolArray:
    """Keep the `keep` highest scores of every group of `group` columns; the shorter last group keeps its share.

    The columns given start at a group boundary. Zeros that are there already always stay.
    """
    rows, width = score_OI.shape
    if present_OI is not None:
        score_OI = np.where(present_OI, score_OI, -np.inf)
    full = width // pattern.group
    kept_OI = np.empty((rows, width), dtype=np.bool_)
    body = full * pattern.group
    if full:
        grouped = np.ascontiguousarray(score_OI[:, :body]).reshape(rows * full, pattern.group)
        kept_OI[:, :body] = keep_highest(grouped, pattern.keep).reshape(rows, body)
    if body < width:
        num_keep = int(pattern.keep_counts_G(width)[-1])
        kept_OI[:, body:] = keep_highest(np.ascontiguousarray(score_OI[:, body:]), num_keep)
    return kept_OI if present_OI is None else kept_OI & present_OI


def select_blocks(
    score_OI: FloatArray, pattern: Blocks, present_OI: BoolArray | None, *, per_row: bool = False, offset: int = 0
) -> BoolArray:
    """Prune the blocks with the lowest sums of scores; blocks that are zero already count towards the fraction.

    Args:
        score_OI: float32, what pruning an entry would cost; the first row and column begin a block.
        pattern: block shape and sparsity.
        present_OI: bool, False where an entry was pruned earlier; None: all are present.
        per_row: blocks compete within their row of blocks, not over the whole matrix.
        offset: how many blocks of the layer come before these (see select_unstructured).

    Returns:
        bool (O, I): whole blocks, without the entries that were pruned earlier.
    """
    present_RC = None
    if present_OI is not None:
        score_OI = np.where(present_OI, score_OI, np.float32(0))
        present_RC = sum_blocks(present_OI, pattern) > 0
    with np.errstate(over="ignore"):  # infinity compares as it should
        score_RC = sum_blocks(score_OI, pattern).astype(np.float32)
    shape = score_RC.shape if per_row else (1, score_RC.size)
    present = None if present_RC is None else present_RC.reshape(shape)
    kept_RC = select_unstructured(score_RC.reshape(shape), pattern.sparsity, present, offset).reshape(score_RC.shape)
    rows, columns = pattern.block_shape
    kept_OI: BoolArray = np.repeat(np.repeat(kept_RC, rows, axis=0), columns, axis=1)
    kept_OI = kept_OI[: score_OI.shape[0], : score_OI.shape[1]]
    return np.ascontiguousarray(kept_OI) if present_OI is None else kept_OI & present_OI


def sum_blocks(value_OI: npt.NDArray[np.float32] | BoolArray, pattern: Blocks) -> npt.NDArray[np.float64]:
    """The sum of the entries of each block, float64 (R, C)."""
    num_down, num_across = pattern.grid_shape((value_OI.shape[0], value_OI.shape[1]))
    if value_OI.size == 0:
        return np.zeros((num_down, num_across))
    rows, columns = pattern.block_shape
    sum_OC = np.add.reduceat(value_OI, np.arange(0, value_OI.shape[1], columns), axis=1, dtype=np.float64)
    sums_RC: npt.NDArray[np.float64] = np.add.reduceat(sum_OC, np.arange(0, value_OI.shape[0], rows), axis=0)
    return sums_RC


def pattern_of(
    kept_OI: BoolArray, wanted: WantedPattern, earlier: Pattern | None, earlier_OI: BoolArray | None
) -> Pattern:
    """Name the pattern that a mask obeys after pruning to `wanted` on top of an earlier mask.

    Where the step prunes nothing new, the earlier pattern is the tighter description (2 of 4, then 30 % unstructured).
    """
    if earlier is not None and earlier_OI is not None and np.array_equal(kept_OI, earlier_OI):
        return earlier
    return sparser(earlier, concrete(wanted, kept_OI.shape, "of this mask"))


def pruned(solution: Solution, kept_OI: BoolArray, wanted: WantedPattern) -> Solution:
    """The solution without the entries that are not kept, the values of the others as they were."""
    pattern = pattern_of(kept_OI, wanted, solution.pattern, solution.mask_OI)
    weight_OI = np.where(kept_OI, solution.weight_OI, np.float32(0))
    return solution.with_matrix(weight_OI, kept_OI, pattern, solution.grid)


def sparser(earlier: Pattern | None, wanted: Pattern) -> Pattern:
    """The pattern that names what is left after two: the mask obeys both, and the sparser one takes fewer bytes."""
    return wanted if earlier is None or wanted.sparsity >= earlier.sparsity else earlier
