"""Low-rank pairs and sums, which run through the kernels of what they are made of."""

import numpy as np
import pytest

from rarefy import kernels
from rarefy.core.grids import IntGrid, dequantize, fit_minmax, quantize
from rarefy.core.solution import Solution
from rarefy.layouts import FORMATS, LowRank, Sum, Tapwise, pack

PARTS = sorted(set(FORMATS) - {"sum-v1"})


def factor(shape: tuple[int, int], num_bits: int | None, seed: int):
    value = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    if num_bits is None:
        return pack(Solution.dense(value))
    grid = fit_minmax(value, IntGrid(num_bits, 32, False))
    return pack(Solution(dequantize(quantize(value, grid), grid), None, None, grid))


def low_rank(rows: int, width: int, rank: int, num_bits: int | None = None) -> LowRank:
    return LowRank(factor((rows, rank), num_bits, 1), factor((rank, width), num_bits, 2))


def tapwise(rows: int, width: int, runs: int, inner: int, outer: int | None) -> Tapwise:
    left = factor((rows, runs * inner), None, 3) if outer is None else low_rank(rows, runs * inner, outer)
    return Tapwise(left, factor((inner, width // runs), None, 4), runs)


@pytest.fixture
def make(weight):
    """A layout of the format with so many rows and columns."""

    def build(name: str, rows: int, width: int):
        if name == "sum-v1":
            return Sum(build("lowrank-int8-v1", rows, width), build("bitmask-int4-v1", rows, width))
        if name.startswith("tapwise"):
            return tapwise(rows, width, 5 if width % 5 == 0 else 1, 3, 4)
        if name.startswith("lowrank"):
            return low_rank(rows, width, 7, 8 if "int8" in name else None)
        return weight(name, rows, width).layout

    return build


def test_low_rank_floats_against_float64(isa, to_eight_bits) -> None:
    rng = np.random.default_rng(3)
    for rows, width, rank in ((1, 1, 1), (17, 65, 3), (64, 130, 16), (33, 97, 67), (5, 700, 2)):
        layout = low_rank(rows, width, rank)
        left, right = (part.to_dense().astype(np.float64) for part in (layout.left, layout.right))
        prepared = kernels.prepare(layout, isa=isa)
        for num_rows in (0, 1, 3, 40):
            x = rng.standard_normal((num_rows, width)).astype(np.float32)
            y = prepared.matmul(x)
            assert y.shape == (num_rows, rows)
            met = to_eight_bits(x)
            inside = met @ right.T
            # The intermediate is rounded again, where an error of the first sums may turn it the other way.
            inside_bound = (width + 2) * 2.0**-24 * (np.abs(met) @ np.abs(right).T) * 1.01
            low, high = (to_eight_bits((inside + sign * inside_bound).astype(np.float32)) for sign in (-1, 1))
            middle, turn = (low + high) / 2, (high - low) / 2
            bound = turn @ np.abs(left).T + (rank + 2) * 2.0**-24 * (np.maximum(abs(low), abs(high)) @ np.abs(left).T)
            assert np.all(np.abs(y - middle @ left.T) <= 1.01 * bound)


@pytest.mark.parametrize("num_bits", [None, 8])
def test_a_low_rank_product_is_two_products(isa, num_bits) -> None:
    layout = low_rank(70, 200, 33, num_bits)
    prepared = kernels.prepare(layout, isa=isa)
    right, left = kernels.prepare(layout.right, isa=isa), kernels.prepare(layout.left, isa=isa)
    assert prepared.nbytes == right.nbytes + left.nbytes
    assert (prepared.shape, prepared.isa) == ((70, 200), isa)
    for shape in ((200,), (1, 200), (2, 5, 200)):
        x = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
        np.testing.assert_array_equal(prepared.matmul(x), left.matmul(right.matmul(x)))
    # and near what it should be, 8-bit activations and all
    x = np.random.default_rng(5).standard_normal((4, 200)).astype(np.float32)
    exact = x @ layout.to_dense().T
    assert np.abs(prepared.matmul(x) - exact).max() < 0.02 * np.abs(exact).max()


@pytest.mark.parametrize("name", PARTS)
def test_a_sum_adds_its_parts_in_order(make, isa, name) -> None:
    for rows, width in ((1, 1), (35, 130)):
        for other in ("bitmask-int4-v1", "lowrank-bf16-v1"):
            layout = Sum(make(name, rows, width), make(other, rows, width))
            prepared = kernels.prepare(layout, isa=isa)
            first, second = (kernels.prepare(part, isa=isa) for part in layout.parts)
            assert prepared.nbytes == first.nbytes + second.nbytes
            for num_rows in (0, 1, 30):
                x = np.random.default_rng(6).standard_normal((num_rows, width)).astype(np.float32)
                np.testing.assert_array_equal(prepared.matmul(x), first.matmul(x) + second.matmul(x))


@pytest.mark.parametrize("outer", [None, 6])
def test_tapwise_factors_are_a_product_for_each_run_and_one_of_all(isa, outer, to_eight_bits) -> None:
    rng = np.random.default_rng(10)
    for rows, width, runs, inner in (
        (1, 1, 1, 1),
        (17, 72, 9, 3),
        (40, 96, 3, 20),
        (8, 6, 2, 0),
        (5, 0, 3, 2),
        (0, 8, 2, 3),
    ):
        layout = tapwise(rows, width, runs, inner, outer)
        prepared = kernels.prepare(layout, isa=isa)
        right, left = kernels.prepare(layout.right, isa=isa), kernels.prepare(layout.left, isa=isa)
        assert prepared.nbytes == right.nbytes + left.nbytes
        assert prepared.tap_factors is not None
        for num_rows in (0, 1, 3, 40):
            x = rng.standard_normal((num_rows, width)).astype(np.float32)
            x = to_eight_bits(x).astype(np.float32)
            y, exact = prepared.matmul(x), x.astype(np.float64) @ layout.to_dense().astype(np.float64).T
            assert y.shape == exact.shape
            # What comes out of a factor is rounded to 8 bits before it meets the next one.
            sizes = np.abs(x).reshape(num_rows * runs, width // runs) @ np.abs(layout.right.to_dense()).T
            sizes = sizes.reshape(num_rows, runs * inner)
            for factor in (layout.left,) if outer is None else (layout.left.right, layout.left.left):
                sizes = sizes @ np.abs(factor.to_dense()).T
            assert np.all(np.abs(y - exact) <= ((1 if outer is None else 2) * 1.01 * 2.0**-8 + 1e-5) * sizes)
            inside = np.stack([right.matmul(np.ascontiguousarray(run)) for run in np.split(x, runs, axis=1)], axis=1)
            # numpy's products may round otherwise where they have another number of rows; the kernels' do not
            tolerance = 1e-5 * np.abs(exact).max(initial=0) if isa == "numpy" else 0
            np.testing.assert_allclose(y, left.matmul(inside.reshape(num_rows, runs * inner)), rtol=0, atol=tolerance)


def test_several_weights_of_every_kind_in_one_call(make, isa) -> None:
    names = ("sum-v1", "dense-int4-v1", "lowrank-bf16-v1", "tapwise-bf16-v1", "sum-v1", "lowrank-int8-v1")
    prepared = [kernels.prepare(make(name, 20 + i, 100), isa=isa) for i, name in enumerate(names)]
    x = np.random.default_rng(7).standard_normal((3, 100)).astype(np.float32)
    for w, y in zip(prepared, kernels.matmul_many(x, prepared), strict=True):
        np.testing.assert_array_equal(y, w.matmul(x))


def test_same_bits_for_every_number_of_threads_and_instruction_set(make, num_threads) -> None:
    if not kernels.compiled_kernels():
        pytest.skip("the extension is not built")
    isas = [name for name in kernels.runnable_isas(kernels.detect_cpu()) if name != "numpy"]
    for name in ("sum-v1", "lowrank-bf16-v1", "lowrank-int8-v1", "tapwise-bf16-v1"):
        layout = make(name, 130, 333)
        x = np.random.default_rng(8).standard_normal((60, 333)).astype(np.float32)
        results = []
        for isa in isas:
            prepared = kernels.prepare(layout, isa=isa)
            for threads in (1, 2, 7):
                num_threads(threads)
                results += [prepared.matmul(x), np.stack([prepared.matmul(row) for row in x])]
        for result in results:
            np.testing.assert_array_equal(result, results[0])


def test_empty_shapes_and_rank_zero(make, isa) -> None:
    for rows, width, rank in ((0, 8, 2), (8, 0, 2), (8, 5, 0), (0, 0, 0)):
        prepared = kernels.prepare(low_rank(rows, width, rank), isa=isa)
        for num_rows in (0, 1, 3):
            y = prepared.matmul(np.ones((num_rows, width), np.float32))
            np.testing.assert_array_equal(y, np.zeros((num_rows, rows), np.float32))


def test_a_non_finite_activation_spoils_its_row_only(make, isa) -> None:
    for name in ("sum-v1", "lowrank-bf16-v1", "lowrank-int8-v1", "tapwise-bf16-v1"):
        prepared = kernels.prepare(make(name, 20, 130), isa=isa)
        x = np.random.default_rng(9).standard_normal((3, 130)).astype(np.float32)
        clean = prepared.matmul(x)
        x[1, 129] = np.nan
        y = prepared.matmul(x)
        np.testing.assert_array_equal(y[[0, 2]], clean[[0, 2]])
        assert np.isnan(y[1]).all()
