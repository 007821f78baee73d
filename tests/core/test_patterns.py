import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rarefy.core.errors import PatternError
from rarefy.core.patterns import NM, Unstructured


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
