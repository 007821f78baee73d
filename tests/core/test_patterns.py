import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Blocks, Unstructured


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, "half", None, True])
def test_impossible_sparsity(sparsity):
    with pytest.raises(PatternError, match="sparsity"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("keep", "group"), [(0, 4), (5, 4), (1, 65), (2.0, 4), (True, 4), ("2", 4), (-1, 4), (1, 0)])
def test_impossible_nm(keep, group):
    with pytest.raises(PatternError, match="keep <= group"):
        NM(keep, group)


def test_sparsity():
    assert NM(keep=2, group=4).sparsity == 0.5
    assert Unstructured(0.7).sparsity == 0.7


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 300))
def test_counts_per_row(keep, group, width):
    keep = min(keep, group)
    pattern = NM(keep, group)
    expected = []
    left = width
    while left > 0:
        columns = min(group, left)
        expected.append(math.ceil(keep * columns / group))
        left -= columns
    assert pattern.keep_counts_G(width).tolist() == expected
    assert pattern.num_groups(width) == len(expected)
    assert pattern.num_kept_per_row(width) == sum(expected)


def test_a_narrow_layer_is_named():
    NM(2, 4).check_fits(4, "m.q")
    with pytest.raises(PatternError, match=r"layer m\.q: input axis 3 is smaller than the group of 4"):
        NM(2, 4).check_fits(3, "m.q")


@pytest.mark.parametrize(
    "shape", [(0, 4), (4, 2**31), (4.0, 4), (True, 4), (4,), (4, 4, 4), [4, 4], "44", None, (-1, 4), ("4", 4)]
)
def test_impossible_blocks(shape):
    with pytest.raises(PatternError, match=r"two integers in \[1, 2\*\*31\)"):
        Blocks(shape, 0.5)
    with pytest.raises(PatternError, match="sparsity"):
        Blocks((4, 4), 1.5)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1))
def test_the_most_that_blocks_can_hold(rows, width, high, wide, sparsity):
    blocks = Blocks((high, wide), sparsity)
    sizes = [
        min(high, rows - top) * min(wide, width - left)
        for top in range(0, rows, high)
        for left in range(0, width, wide)
    ]
    down, across = blocks.grid_shape((rows, width))
    assert down * across == len(sizes)
    num_keep = len(sizes) - round(sparsity * len(sizes))
    assert blocks.max_num_values((rows, width)) == sum(sorted(sizes, reverse=True)[:num_keep])
    if sizes:
        assert blocks.is_even((rows, width)) == all(size == high * wide for size in sizes)
