import numpy as np
import pytest

from rarefy.core.errors import LayoutError, NonFiniteError
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.patterns import NM, Unstructured
from rarefy.core.solution import Solution


def example() -> tuple[np.ndarray, np.ndarray]:
    weight = np.arange(1, 25, dtype=np.float32).reshape(3, 8)
    mask = np.tile(np.array([True, True, False, False]), (3, 2))
    return weight * mask, mask


def test_dense():
    weight = np.ones((2, 3), dtype=np.float32)
    solution = Solution.dense(weight)
    assert solution.weight_OI is weight
    assert (solution.mask_OI, solution.pattern, solution.grid) == (None, None, None)
    assert solution.shape == (2, 3)
    solution.check()


def test_valid_solutions_pass():
    weight, mask = example()
    Solution(weight, mask, NM(2, 4), None).check()
    Solution(weight, mask, Unstructured(0.5), None).check()
    fitted = fit_minmax(weight, IntGrid(4, None, False))
    Solution(dequantize(quantize(weight, fitted), fitted), mask, NM(2, 4), fitted).check()
    Solution(np.zeros((0, 4), np.float32), np.zeros((0, 4), bool), NM(2, 4), None).check()


@pytest.mark.parametrize(
    "make",
    [
        lambda w, m: Solution(w.astype(np.float64), None, None, None),
        lambda w, m: Solution(w[0], None, None, None),
        lambda w, m: Solution(w, m, None, None),
        lambda w, m: Solution(w, None, NM(2, 4), None),
        lambda w, m: Solution(w, m[:2], NM(2, 4), None),
        lambda w, m: Solution(w, m.astype(np.uint8), NM(2, 4), None),
        lambda w, m: Solution(w, None, None, fit_minmax(w[:2], IntGrid(4, None, True))),
    ],
)
def test_dtypes_and_shapes_are_checked_at_once(make):
    with pytest.raises(LayoutError):
        make(*example())


def test_broken_invariants():
    weight, mask = example()
    with pytest.raises(LayoutError, match="not zero"):
        Solution(weight + 1, mask, NM(2, 4), None).check()
    with pytest.raises(LayoutError, match="more than its pattern"):
        Solution(weight, mask, NM(1, 4), None).check()
    fitted = fit_minmax(weight, IntGrid(4, None, True))
    with pytest.raises(LayoutError, match="not on its grid"):
        Solution(weight, mask, NM(2, 4), fitted).check()
    with pytest.raises(NonFiniteError):
        Solution.dense(np.array([[np.nan]], dtype=np.float32)).check()
