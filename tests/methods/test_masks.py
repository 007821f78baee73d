"""Mask selection against sorting in plain Python."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rarefy.core.patterns import NM, Blocks
from rarefy.methods.masks import keep_highest, num_pruned, select_blocks, select_nm, select_unstructured

SCORES = arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 30)),
    elements=st.sampled_from([0.0, 1.0, 2.0, 3.0, 1e30, -np.inf, np.inf]),
)


def kept_by_sorting(scores: list[float], num_keep: int) -> list[bool]:
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return [place in order[:num_keep] for place in range(len(scores))]


@given(SCORES, st.integers(0, 30))
def test_keep_highest_keeps_the_highest_and_of_ties_the_left_ones(score_ON: np.ndarray, num_keep: int) -> None:
    num_keep = min(num_keep, score_ON.shape[1])
    expected = [kept_by_sorting(row, num_keep) for row in score_ON.tolist()]
    assert keep_highest(score_ON, num_keep).tolist() == expected


@given(SCORES, st.integers(1, 9), st.integers(1, 9))
def test_select_nm_keeps_the_share_of_every_group(score_OI: np.ndarray, keep: int, group: int) -> None:
    if keep > group or group > score_OI.shape[1]:
        return
    kept_OI = select_nm(score_OI, NM(keep, group), None)
    for row, kept in zip(score_OI.tolist(), kept_OI.tolist(), strict=True):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            assert kept[start : start + group] == kept_by_sorting(part, -(-keep * len(part) // group))


@given(SCORES, st.floats(0, 1), st.integers(0, 100))
def test_unstructured_zeros_are_exact_over_the_rows(score_ON: np.ndarray, sparsity: float, offset: int) -> None:
    kept_ON = select_unstructured(score_ON, sparsity, None, offset)
    stop = offset + score_ON.size
    assert (~kept_ON).sum() == round(sparsity * stop) - round(sparsity * offset)
    assert np.ptp((~kept_ON).sum(axis=1)) <= 1


def test_parts_of_a_layer_sum_to_its_total() -> None:
    edges = [0, 3, 50, 51, 200, 333]
    assert sum(num_pruned(0.37, start, stop) for start, stop in pairwise(edges)) == round(0.37 * 333)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_earlier_zeros_stay_and_count(sparsity: float) -> None:
    score_ON = np.arange(20, dtype=np.float32).reshape(2, 10)[:, ::-1].copy()
    present_ON = np.ones((2, 10), dtype=np.bool_)
    present_ON[:, :4] = False  # the highest scores were pruned before
    kept_ON = select_unstructured(score_ON, sparsity, present_ON)
    assert not kept_ON[:, :4].any()
    assert (~kept_ON).sum() == max(8, round(20 * sparsity))
    nm_ON = select_nm(score_ON, NM(1, 2), present_ON)
    assert nm_ON.tolist() == [[False] * 4 + [True, False] * 3] * 2


@given(SCORES, st.integers(1, 4), st.integers(1, 9), st.floats(0, 1), st.booleans())
def test_select_blocks_keeps_the_blocks_of_highest_sums(
    score_OI: np.ndarray, high: int, wide: int, sparsity: float, per_row: bool
) -> None:
    score_OI = np.where(np.isfinite(score_OI), score_OI, np.float32(0))
    pattern = Blocks((high, wide), sparsity)
    kept_OI = select_blocks(score_OI, pattern, None, per_row=per_row)
    rows, width = score_OI.shape
    sums, kept = [], []
    for top in range(0, rows, high):
        blocks = [(slice(top, top + high), slice(left, left + wide)) for left in range(0, width, wide)]
        sums.append([float(np.float32(sum(score_OI[block].ravel().tolist()))) for block in blocks])
        for block in blocks:
            assert kept_OI[block].all() or not kept_OI[block].any()
        kept.append([bool(kept_OI[block].all()) for block in blocks])
    num_blocks = sum(map(len, sums))
    assert sum(not k for row in kept for k in row) == round(sparsity * num_blocks)
    if not per_row:
        sums, kept = ([[value for row in rows for value in row]] for rows in (sums, kept))
    for row, chosen in zip(sums, kept, strict=True):
        assert chosen == kept_by_sorting(row, sum(chosen))


def test_blocks_that_are_zero_already_count_and_stay() -> None:
    score_OI = np.arange(64, dtype=np.float32).reshape(4, 16)
    present_OI = np.ones((4, 16), dtype=np.bool_)
    present_OI[2:, 8:] = False  # the block of the highest scores
    present_OI[0, :8:2] = False  # a part of another
    kept_OI = select_blocks(score_OI, Blocks((2, 8), 0.5), present_OI)
    expected = np.zeros((4, 16), dtype=np.bool_)
    expected[:2, 8:] = expected[2:, :8] = True
    assert kept_OI.tolist() == expected.tolist()
    assert select_blocks(score_OI, Blocks((2, 8), 0.25), present_OI).tolist() == present_OI.tolist()
