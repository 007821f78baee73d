"""Blocks against numpy in float64: sums of outer products, inverses, and entries dropped one after the other."""

import numpy as np
import pytest

from rarefy.kernels import fisher, get_num_threads, set_num_threads
from rarefy.kernels.extension import native

pytestmark = pytest.mark.skipif(native() is None, reason="no compiled kernels")

SIZES = [1, 2, 7, 15, 16, 17, 31, 33, 64]


def problem(count: int, size: int, seed: int = 0):
    """Weights, and well-conditioned blocks."""
    rng = np.random.default_rng(seed)
    vector_NRB = rng.normal(size=(count, 2 * size + 3, size))
    block_NBB = vector_NRB.swapaxes(1, 2) @ vector_NRB / (2 * size)
    return rng.normal(size=(count, size)).astype(np.float32), block_NBB.astype(np.float32)


def triangles(block_NBB):
    """Lower triangles, row after row."""
    return np.ascontiguousarray(block_NBB[:, *np.tril_indices(block_NBB.shape[-1])])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [0, 1, 5])
def test_outer_products_are_added(size, num_rows):
    rng = np.random.default_rng(size)
    count = 5
    start = rng.normal(size=(count, size, size)).astype(np.float32)
    bits_RX = rng.integers(0x3F00, 0x4000, size=(num_rows, count * size), dtype=np.uint16)
    bits_RX |= rng.integers(0, 2, size=bits_RX.shape, dtype=np.uint16) << 15
    vector_RX = (bits_RX.astype(np.uint32) << 16).view(np.float32)
    wide = vector_RX.reshape(num_rows, count, size).astype(np.float64)
    expected = start + np.einsum("rni,rnj->nij", wide, wide)
    for given in (bits_RX, vector_RX):
        total = triangles(start)
        fisher.add_outer_products(list(given), size, total)
        np.testing.assert_allclose(total, triangles(expected), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_inverses(size):
    _, block_NBB = problem(6, size)
    inverse_NBB = fisher.invert_blocks(triangles(block_NBB), size, 0.7, 0.05)
    expected = np.linalg.inv(block_NBB.astype(np.float64) / 0.7 + 0.05 * np.eye(size))
    np.testing.assert_allclose(inverse_NBB, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def without(inverse_BB, weight_B, gone):
    """The rest after one entry is dropped, in float64."""
    column_B = inverse_BB[:, gone] / inverse_BB[gone, gone]
    return inverse_BB - np.outer(column_B, inverse_BB[gone]), weight_B - column_B * weight_B[gone]


@pytest.mark.parametrize("size", SIZES)
def test_entries_go_in_the_order_of_their_costs(size):
    count = 4
    weight_NB, inverse_NBB = problem(count, size, seed=1)
    free_NB = np.random.default_rng(2).random((count, size)) < 0.8
    before = weight_NB.copy(), inverse_NBB.copy()
    cost_NB = fisher.costs_in_order(weight_NB, inverse_NBB, free_NB)
    assert np.array_equal(before[0], weight_NB)
    assert np.array_equal(before[1], inverse_NBB)
    for block in range(count):
        inverse_BB, weight_B = inverse_NBB[block].astype(np.float64), weight_NB[block].astype(np.float64)
        left, most, expected = set(np.flatnonzero(free_NB[block]).tolist()), 0.0, np.zeros(size)
        while left:
            gone = min(left, key=lambda each: weight_B[each] ** 2 / inverse_BB[each, each])
            most = max(most, weight_B[gone] ** 2 / inverse_BB[gone, gone])
            expected[gone] = most
            inverse_BB, weight_B = without(inverse_BB, weight_B, gone)
            left.discard(gone)
        np.testing.assert_allclose(cost_NB[block], expected, rtol=2e-2 if size > 32 else 2e-3, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_dropped_entries_are_zero_and_the_others_make_up(size):
    count = 4
    weight_NB, block_NBB = problem(count, size, seed=3)
    drop_NB = np.random.default_rng(4).random((count, size)) < 0.4
    drop_NB[0] = False
    inverse_NBB = fisher.invert_blocks(triangles(block_NBB), size, 1.0, 0.05)
    after_NB, after_NBB = weight_NB.copy(), inverse_NBB.copy()
    fisher.drop_entries(drop_NB, after_NB, after_NBB)
    assert not after_NB[drop_NB].any()
    np.testing.assert_array_equal(after_NB[0], weight_NB[0])
    for block in range(count):
        matrix_BB = block_NBB[block] + 0.05 * np.eye(size)
        kept = np.flatnonzero(~drop_NB[block])
        if not len(kept):
            continue
        part_KK = matrix_BB[np.ix_(kept, kept)]
        expected = np.linalg.solve(part_KK, matrix_BB[kept] @ weight_NB[block])
        np.testing.assert_allclose(after_NB[block, kept], expected, rtol=1e-3, atol=1e-3)
        inverse = np.linalg.inv(part_KK)
        found = after_NBB[block][np.ix_(kept, kept)]
        np.testing.assert_allclose(found, inverse, rtol=1e-3, atol=1e-4 * np.abs(inverse).max())


def test_threads_give_the_same_bits():
    weight_NB, block_NBB = problem(3000, 16, seed=5)
    free_NB = np.ones(weight_NB.shape, dtype=bool)
    threads = get_num_threads()
    found = []
    try:
        for number in (1, 3):
            set_num_threads(number)
            inverse_NBB = fisher.invert_blocks(triangles(block_NBB), 16, 1.0, 0.01)
            cost_NB = fisher.costs_in_order(weight_NB, inverse_NBB, free_NB)
            total = triangles(block_NBB)
            fisher.add_outer_products([weight_NB.reshape(-1)], 16, total)
            moved = weight_NB.copy()
            fisher.drop_entries(cost_NB < np.median(cost_NB), moved, inverse_NBB)
            found.append((cost_NB, total, moved, inverse_NBB))
    finally:
        set_num_threads(threads)
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))


def test_arrays_that_do_not_fit_are_refused():
    weight_NB, block_NBB = problem(3, 4)
    free_NB = np.ones(weight_NB.shape, dtype=bool)
    with pytest.raises(ValueError, match="a vector for every block"):
        fisher.add_outer_products(list(weight_NB.reshape(2, -1)), 4, triangles(block_NBB))
    for size in (-1, 0, 3, 5):
        with pytest.raises(ValueError, match="1 to 512 rows" if size < 1 else "triangles must have"):
            fisher.add_outer_products([weight_NB.reshape(-1)], size, triangles(block_NBB))
    with pytest.raises(ValueError, match="triangles must have"):
        fisher.invert_blocks(triangles(block_NBB), 3, 1.0, 0.1)
    with pytest.raises(ValueError, match="square"):
        native().fisher_invert(triangles(block_NBB), 1.0, 0.1, block_NBB[:, :3].copy())
    with pytest.raises(ValueError, match="an inverse for every block"):
        native().fisher_invert(triangles(block_NBB), 1.0, 0.1, block_NBB[:2].copy())
    with pytest.raises(ValueError, match="a vector as long"):
        fisher.costs_in_order(weight_NB[:2], block_NBB, free_NB)
    with pytest.raises(ValueError, match="a vector as long"):
        fisher.drop_entries(free_NB[:, :3].copy(), weight_NB, block_NBB)
    wide = np.zeros((1, 513, 513), np.float32)
    with pytest.raises(ValueError, match="1 to 512"):
        fisher.invert_blocks(triangles(wide), 513, 1.0, 0.1)
