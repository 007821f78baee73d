"""Products with block sparse weights, in blocks that the kernels skip as a whole and in others."""

import numpy as np
import pytest

from rarefy import kernels

# multiples of 16 by 32 run in their own kernels, the others as a bitmask
BLOCKS = [(16, 64), (16, 32), (32, 64), (48, 96), (16, 256), (64, 4096), (4, 4), (1, 8), (32, 1), (24, 64), (16, 48)]
SHAPES = [(1, 1), (16, 64), (17, 65), (33, 97), (47, 333), (96, 640)]


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_products_are_those_of_the_dense_matrix(weight, isa, block_shape) -> None:
    rng = np.random.default_rng(1)
    for (rows, width), density in zip(SHAPES, (1.0, 0.5, 0.7, 0.25, 0.5, 0.1), strict=True):
        for group_size, symmetric in ((None, True), (32, False), (64, True), (96, False)):
            w = weight(
                "block-int8-v1",
                rows,
                width,
                block_shape=block_shape,
                density=density,
                group_size=group_size,
                symmetric=symmetric,
                scales=(0.5, 1.0, 2.0),
            )
            np.testing.assert_array_equal(w.layout.to_dense(), w.dense_OI)
            prepared = kernels.prepare(w.layout, isa=isa)
            for num_rows in (1, 2, 13, 25, 50):
                x = rng.integers(-127, 128, (num_rows, width)).astype(np.float32)
                x[:, ::64] = 127.0
                expected = x.astype(np.float64) @ w.dense_OI.T
                assert np.all(np.abs(2 * expected) < 2**24)
                np.testing.assert_array_equal(prepared.matmul(x), expected.astype(np.float32))
        w = weight("block-bf16-v1", rows, width, block_shape=block_shape, density=density)
        np.testing.assert_array_equal(w.layout.to_dense(), w.dense_OI)
        prepared = kernels.prepare(w.layout, isa=isa)
        for num_rows in (1, 2, 13, 25, 50):
            x = rng.standard_normal((num_rows, width)).astype(np.float32)
            expected = w.met(x) @ w.dense_OI.T
            bound = (width + 2) * 2.0**-24 * (np.abs(w.met(x)) @ np.abs(w.dense_OI).T) * 1.01
            assert np.all(np.abs(prepared.matmul(x) - expected) <= bound)


@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_same_bits_as_the_bitmask_kernels(weight, num_threads, block_shape) -> None:
    if not kernels.compiled_kernels():
        pytest.skip("the extension is not built")
    isas = [name for name in kernels.runnable_isas(kernels.detect_cpu()) if name != "numpy"]
    rng = np.random.default_rng(2)
    for layout_format, group_size in (("block-bf16-v1", None), ("block-int8-v1", 96), ("block-int8-v1", 128)):
        w = weight(layout_format, 75, 420, block_shape=block_shape, group_size=group_size, symmetric=False, density=0.4)
        x = rng.standard_normal((125, 420)).astype(np.float32)
        expected = kernels.prepare(w.layout.as_bitmask(), isa=isas[-1]).matmul(x)
        for name in isas:
            prepared = kernels.prepare(w.layout, isa=name)
            for threads in (1, 2, 5):
                num_threads(threads)
                np.testing.assert_array_equal(prepared.matmul(x), expected)
                np.testing.assert_array_equal(prepared.matmul(x[7]), expected[7])
                np.testing.assert_array_equal(prepared.matmul(x[3:5]), expected[3:5])


@pytest.mark.parametrize("block_shape", [(16, 64), (32, 32), (16, 96)], ids=str)
@pytest.mark.parametrize(
    ("layout_format", "group_size", "symmetric"),
    [
        ("block-int8-v1", None, True),
        ("block-int8-v1", 64, False),
        ("block-int8-v1", 96, True),
        ("block-int8-v1", 32, False),
        ("block-bf16-v1", None, True),
    ],
)
def test_many_rows_of_wide_weights(weight, isa, num_threads, block_shape, layout_format, group_size, symmetric) -> None:
    """Whole tiles and what is left of them, and more activations than a cache holds: the bits of every row alone."""
    if layout_format == "block-bf16-v1" and isa in ("numpy", "amx"):
        pytest.skip("it sums many rows of floats in an order of its own")
    num_threads(2)
    for num_rows, width in ((127, 2200), (100, 9000)):
        w = weight(
            layout_format,
            40,
            width,
            block_shape=block_shape,
            group_size=group_size,
            symmetric=symmetric,
            density=0.3,
        )
        prepared = kernels.prepare(w.layout, isa=isa)
        x = np.random.default_rng(3).standard_normal((num_rows, width)).astype(np.float32)
        x[5, 70] = np.nan
        np.testing.assert_array_equal(prepared.matmul(x), np.stack([prepared.matmul(row) for row in x]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout_format", ["block-bf16-v1", "block-int8-v1"])
def test_a_non_finite_activation_is_seen_where_its_blocks_are_zero(weight, layout_format, isa, bad) -> None:
    w = weight(layout_format, 40, 200, density=0.0)
    prepared = kernels.prepare(w.layout, isa=isa)
    for num_rows in (3, 19):
        x = np.ones((num_rows, 200), np.float32)
        x[1, 70] = bad
        y = prepared.matmul(x)
        assert not np.delete(y, 1, axis=0).any()
        assert np.isnan(y[1]).all()
        assert np.isnan(prepared.matmul(x[1])).all()
